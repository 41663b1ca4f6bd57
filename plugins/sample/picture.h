// A picture as a network's input, as `asvit_deploy.data.images.preprocess` makes it: resized, cropped, normalised. The
// pixels are Pillow's to the bit: the same weights in fixed point (22 bits), rounded to bytes after each direction,
// rows first (Pillow 13 begins with the columns of some tall pictures, which turns some bytes).
//
// Binary PPM (P6, 8 bits) is what is read: it needs no library, and whatever decodes a JPEG can write it.
#pragma once

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace sample
{

struct Picture
{
    int64_t width;
    int64_t height;
    std::vector<uint8_t> pixels; // [height, width, 3]
};

[[noreturn]] inline void fail(std::string const& what) { throw std::runtime_error(what); }

inline std::string contentOf(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    if (!file)
    {
        fail(path + " cannot be read");
    }
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

inline bool isSpace(char character) { return std::isspace(static_cast<unsigned char>(character)) != 0; }

inline Picture readPpm(std::string const& path)
{
    constexpr int64_t kMOST = 100'000'000; // pixels
    std::string const content = contentOf(path);
    size_t at = 2;
    int64_t numbers[3]{}; // width, height, the largest value
    bool whole = content.rfind("P6", 0) == 0;
    for (int64_t& number : numbers)
    {
        while (whole && at < content.size() && (isSpace(content[at]) || content[at] == '#'))
        {
            at = content[at] == '#' ? std::min(content.find('\n', at), content.size()) : at + 1;
        }
        size_t const start = at;
        while (at < content.size() && at - start < 9 && content[at] >= '0' && content[at] <= '9')
        {
            number = number * 10 + (content[at++] - '0');
        }
        whole = whole && at > start;
    }
    if (!whole || numbers[2] != 255 || numbers[0] < 1 || numbers[1] < 1 || numbers[0] > kMOST / numbers[1])
    {
        fail(path + " is no binary PPM of 8 bits (P6); write one with Pillow, ImageMagick or djpeg");
    }
    auto const bytes = static_cast<size_t>(numbers[0] * numbers[1] * 3);
    if (content.size() < at + 1 + bytes)
    {
        fail(path + " ends early; write it again");
    }
    auto const begin = content.begin() + static_cast<std::ptrdiff_t>(at + 1);
    return {numbers[0], numbers[1], {begin, begin + static_cast<std::ptrdiff_t>(bytes)}};
}

// How a picture becomes the input; the fields of `preprocessing` in sidecars and in ONNX metadata.
struct Rules
{
    double cropPct{};
    float mean[3]{};
    float std[3]{};
    bool bicubic{};
    bool squash{};
};

// The text behind `"key":`, in JSON that we wrote ourselves: keys of `preprocessing` stand there once.
inline std::string valueOf(std::string const& json, std::string const& key)
{
    size_t const at = json.find('"' + key + "\":");
    if (at == std::string::npos)
    {
        fail("the model does not say its " + key + "; export it again");
    }
    return json.substr(at + key.size() + 3, 200);
}

inline void readChannels(std::string const& json, std::string const& key, float (&values)[3])
{
    std::string const text = valueOf(json, key);
    char const* at = text.c_str() + text.find('[') + 1;
    for (float& value : values)
    {
        char* end{};
        value = static_cast<float>(std::strtod(at, &end));
        if (end == at)
        {
            fail("the model's " + key + " is not three numbers; export it again");
        }
        for (at = end; *at == ',' || isSpace(*at); ++at)
        {
        }
    }
}

// Args: JSON that holds `preprocessing`, or its fields themselves.
inline Rules readRules(std::string const& json)
{
    size_t const at = json.find("\"preprocessing\":");
    std::string const own = at == std::string::npos ? json : json.substr(at);
    Rules rules;
    rules.cropPct = std::strtod(valueOf(own, "crop_pct").c_str(), nullptr);
    readChannels(own, "mean", rules.mean);
    readChannels(own, "std", rules.std);
    std::string const filter = valueOf(own, "interpolation").substr(0, 12);
    rules.bicubic = filter.find("\"bicubic\"") != std::string::npos;
    if (!rules.bicubic && filter.find("\"bilinear\"") == std::string::npos)
    {
        fail("this sample resizes bicubic and bilinear, and the model wants another interpolation");
    }
    rules.squash = own.find("\"crop_mode\": \"squash\"") != std::string::npos;
    if (!(rules.cropPct > 0 && rules.cropPct <= 1))
    {
        fail("the model's crop_pct is not between 0 and 1; export it again");
    }
    return rules;
}

// The filters' weights at a distance in units of their own.
inline double weightAt(double x, bool bicubic)
{
    x = std::abs(x);
    if (!bicubic)
    {
        return x < 1 ? 1 - x : 0;
    }
    constexpr double kA = -0.5;
    if (x < 1)
    {
        return ((kA + 2) * x - (kA + 3)) * x * x + 1;
    }
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * kA : 0;
}

// One direction: each of so many lines of `from` pixels becomes one of `to`; lines are rows or columns. Every pixel is
// the sum of its neighbours by the filter, which is as wide as the pixels it replaces.
inline std::vector<uint8_t> resizeLines(std::vector<uint8_t> const& pixels, int64_t lines, int64_t from, int64_t to,
                                        bool rows, bool bicubic)
{
    constexpr int kBITS = 22;
    double const scale = static_cast<double>(from) / static_cast<double>(to);
    double const wide = std::max(scale, 1.0);
    double const support = (bicubic ? 2.0 : 1.0) * wide;
    int64_t const step = rows ? 1 : lines;
    std::vector<uint8_t> result(static_cast<size_t>(lines * to * 3));
    for (int64_t x = 0; x < to; ++x)
    {
        double const centre = (static_cast<double>(x) + 0.5) * scale;
        auto const first = std::max<int64_t>(static_cast<int64_t>(centre - support + 0.5), 0);
        auto const last = std::min<int64_t>(static_cast<int64_t>(centre + support + 0.5), from);
        std::vector<double> weights;
        double sum = 0;
        for (int64_t i = first; i < last; ++i)
        {
            weights.push_back(weightAt((static_cast<double>(i) - centre + 0.5) * (1 / wide), bicubic));
            sum += weights.back();
        }
        std::vector<int> fixed;
        for (double const weight : weights)
        {
            double const scaled = (sum != 0 ? weight / sum : weight) * (1 << kBITS);
            fixed.push_back(static_cast<int>(scaled + (scaled < 0 ? -0.5 : 0.5)));
        }
        for (int64_t line = 0; line < lines; ++line)
        {
            int64_t const start = rows ? line * from : line;
            uint8_t* const out = &result[static_cast<size_t>((rows ? line * to + x : x * lines + line) * 3)];
            for (int64_t channel = 0; channel < 3; ++channel)
            {
                int total = 1 << (kBITS - 1);
                for (size_t i = 0; i < fixed.size(); ++i)
                {
                    int64_t const place = start + (first + static_cast<int64_t>(i)) * step;
                    total += pixels[static_cast<size_t>(place * 3 + channel)] * fixed[i];
                }
                out[channel] = static_cast<uint8_t>(std::clamp(total >> kBITS, 0, 255));
            }
        }
    }
    return result;
}

inline Picture resize(Picture picture, int64_t width, int64_t height, bool bicubic)
{
    if (picture.width != width)
    {
        picture.pixels = resizeLines(picture.pixels, picture.height, picture.width, width, true, bicubic);
        picture.width = width;
    }
    if (picture.height != height)
    {
        picture.pixels = resizeLines(picture.pixels, width, picture.height, height, false, bicubic);
        picture.height = height;
    }
    return picture;
}

// float32 [3, size, size].
inline std::vector<float> preprocess(Picture picture, Rules const& rules, int64_t size)
{
    auto const side = static_cast<int64_t>(static_cast<double>(size) / rules.cropPct);
    // As Python's int(short * long / short): a float64 quotient of exact integers, cut.
    auto const other = [side](int64_t longer, int64_t shorter)
    { return static_cast<int64_t>(static_cast<double>(side * longer) / static_cast<double>(shorter)); };
    bool const upright = picture.width <= picture.height;
    int64_t const width = rules.squash || upright ? side : other(picture.width, picture.height);
    int64_t const height = rules.squash || !upright ? side : other(picture.height, picture.width);
    picture = resize(std::move(picture), width, height, rules.bicubic);
    // Half to even, as Python rounds.
    auto const left = static_cast<int64_t>(std::nearbyint(static_cast<double>(width - size) / 2));
    auto const top = static_cast<int64_t>(std::nearbyint(static_cast<double>(height - size) / 2));
    std::vector<float> input(static_cast<size_t>(3 * size * size));
    for (int64_t channel = 0; channel < 3; ++channel)
    {
        for (int64_t y = 0; y < size; ++y)
        {
            for (int64_t x = 0; x < size; ++x)
            {
                int64_t const from = ((top + y) * width + left + x) * 3 + channel;
                float const pixel = static_cast<float>(picture.pixels[static_cast<size_t>(from)]) / 255.0F;
                input[static_cast<size_t>((channel * size + y) * size + x)] =
                    (pixel - rules.mean[channel]) / rules.std[channel];
            }
        }
    }
    return input;
}

} // namespace sample
