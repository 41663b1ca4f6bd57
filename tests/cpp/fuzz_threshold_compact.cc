// Random cases for plugins/threshold_compact.h, compared bit for bit with a plain second implementation here, and
// written to stdout so that the numpy oracle can be compared as well. Build it with -fsanitize=address,undefined.
//
//   fuzz_threshold_compact CASES SEED > cases     stdout is a pipe or a file of records; nothing is written to a
//   terminal
//
// Of the cases, by size: 97.3 % small (B 1-4, M 2-33, D 0-24), 2.5 % medium (B 1-8, M 2-197, D 1-384) and
// 0.2 % large (B 1-8, M 197 or 577, D 64-768 in steps of 64). Every tenth large case is the largest, B = 8, M = 577,
// D = 768. P is 1 in half of them, else up to 6, or up to M-1. Types are float, float16 and bfloat16 alike; the payload
// is random bits, NaN patterns included.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "../../plugins/threshold_compact.h"

namespace
{

constexpr float kINF = std::numeric_limits<float>::infinity();
constexpr float kNAN = std::numeric_limits<float>::quiet_NaN();

struct Case
{
    int64_t images, rows, prefix, width, type; // B, M, P, D; 0 float, 1 float16, 2 bfloat16
    float threshold;
    std::vector<char> tokens;
    std::vector<float> scores;

    int64_t rowBytes() const { return width * (type == 0 ? 4 : 2); }
    int64_t imageTokens() const { return rows - prefix; }
};

struct Result
{
    std::vector<char> compact;
    std::vector<int64_t> index, length;
    int64_t size;

    bool operator==(Result const& other) const
    {
        return compact == other.compact && index == other.index && length == other.length && size == other.size;
    }
};

class Random
{
public:
    explicit Random(uint64_t seed) : mEngine(seed) {}

    int64_t between(int64_t low, int64_t high)
    {
        return low + static_cast<int64_t>(mEngine() % static_cast<uint64_t>(high - low + 1));
    }

    bool chance(int64_t percent) { return between(1, 100) <= percent; }

    float unit() { return static_cast<float>(mEngine() >> 40) / 16777216.0F; }

    void bits(std::vector<char>& bytes)
    {
        for (size_t i = 0; i < bytes.size(); i += 8)
        {
            uint64_t const word = mEngine();
            std::memcpy(bytes.data() + i, &word, std::min<size_t>(8, bytes.size() - i));
        }
    }

private:
    std::mt19937_64 mEngine;
};

void drawSizes(Random& random, Case& drawn)
{
    int64_t const kind = random.between(1, 1000);
    if (kind <= 2)
    {
        bool const largest = random.chance(10);
        drawn.images = largest ? 8 : random.between(1, 8);
        drawn.rows = largest || random.chance(50) ? 577 : 197;
        drawn.width = largest ? 768 : 64 * random.between(1, 12);
    }
    else if (kind <= 27)
    {
        drawn.images = random.between(1, 8);
        drawn.rows = random.between(2, 197);
        drawn.width = random.between(1, 384);
    }
    else
    {
        drawn.images = random.between(1, 4);
        drawn.rows = random.between(2, 33);
        drawn.width = random.between(0, 24);
    }
    drawn.prefix = 1;
    if (random.chance(50))
    {
        int64_t const most = random.chance(70) ? std::min<int64_t>(6, drawn.rows - 1) : drawn.rows - 1;
        drawn.prefix = random.between(1, most);
    }
    drawn.type = random.between(0, 2);
}

// Scores of one image: plain, few levels (ties), or one constant; then special values strewn in.
void drawScores(Random& random, float* scores, int64_t count)
{
    static constexpr std::array<float, 9> kSPECIAL{kNAN,
                                                   -kNAN,
                                                   kINF,
                                                   -kINF,
                                                   0.0F,
                                                   -0.0F,
                                                   std::numeric_limits<float>::denorm_min(),
                                                   std::numeric_limits<float>::max(),
                                                   std::numeric_limits<float>::lowest()};
    int64_t const levels = random.chance(50) ? 0 : random.between(1, 5);
    float const constant = kSPECIAL[static_cast<size_t>(random.between(0, 8))];
    bool const isConstant = random.chance(10);
    int64_t const strewn = random.chance(60) ? 0 : random.between(1, 100);
    for (int64_t i = 0; i < count; ++i)
    {
        float const plain = random.unit() - 0.3F;
        scores[i] = levels > 0 ? std::floor(plain * static_cast<float>(levels)) : plain;
        scores[i] = isConstant ? constant : scores[i];
        if (strewn > 0 && random.chance(strewn))
        {
            scores[i] = kSPECIAL[static_cast<size_t>(random.between(0, 8))];
        }
    }
}

float drawThreshold(Random& random, std::vector<float> const& scores)
{
    switch (random.between(0, 9))
    {
    case 0:
        return kINF;
    case 1:
        return -kINF;
    case 2:
        return kNAN;
    case 3:
        return 0.0F;
    case 4:
    case 5:
    case 6: // exactly one of the scores: strictness shows
        return scores[static_cast<size_t>(random.between(0, static_cast<int64_t>(scores.size()) - 1))];
    default:
        return random.unit() - 0.3F;
    }
}

Case draw(Random& random)
{
    Case drawn{};
    drawSizes(random, drawn);
    drawn.tokens.resize(static_cast<size_t>(drawn.images * drawn.rows * drawn.rowBytes()));
    random.bits(drawn.tokens);
    int64_t const count = drawn.imageTokens();
    drawn.scores.resize(static_cast<size_t>(drawn.images * count));
    for (int64_t b = 0; b < drawn.images; ++b)
    {
        drawScores(random, drawn.scores.data() + b * count, count);
    }
    drawn.threshold = drawThreshold(random, drawn.scores);
    return drawn;
}

// The header under test, in buffers of exactly the right size.
Result tested(Case const& drawn)
{
    asvit::Batch const batch{drawn.images,        drawn.rows,          drawn.prefix,   drawn.rowBytes(),
                             drawn.tokens.data(), drawn.scores.data(), drawn.threshold};
    if (asvit::refusal(drawn.images, drawn.rows, drawn.imageTokens()) != nullptr)
    {
        std::fprintf(stderr, "a legal batch is refused\n");
        std::exit(1);
    }
    Result result;
    result.length.resize(static_cast<size_t>(drawn.images));
    result.size = asvit::measure(batch, result.length.data());
    // Filled with what a correct kernel never leaves behind.
    result.compact.assign(static_cast<size_t>(drawn.images * result.size * drawn.rowBytes()), '\x5a');
    result.index.assign(static_cast<size_t>(drawn.images * result.size), -7);
    asvit::fill(batch, result.length.data(), result.size, result.compact.data(), result.index.data());
    return result;
}

// The contract as it reads: rank, mark, then place row by row.
Result plain(Case const& drawn)
{
    std::vector<std::vector<int64_t>> kept;
    Result result{};
    for (int64_t b = 0; b < drawn.images; ++b)
    {
        int64_t const count = drawn.imageTokens();
        std::vector<float> const scores(drawn.scores.begin() + b * count, drawn.scores.begin() + (b + 1) * count);
        auto const kind = [](float a) { return std::isnan(a) ? 1 : a == -kINF ? 0 : 2; };
        auto const lower = [&](float a, float c) { return kind(a) != kind(c) ? kind(a) < kind(c) : a < c; };
        auto const best = std::max_element(scores.begin(), scores.end(), lower) - scores.begin();
        std::vector<int64_t> rows;
        for (int64_t row = 0; row < drawn.rows; ++row)
        {
            int64_t const i = row - drawn.prefix;
            if (i < 0 || i == best || scores[static_cast<size_t>(i)] > drawn.threshold)
            {
                rows.push_back(row);
            }
        }
        result.length.push_back(static_cast<int64_t>(rows.size()));
        kept.push_back(rows);
    }
    result.size = *std::max_element(result.length.begin(), result.length.end());
    for (int64_t b = 0; b < drawn.images; ++b)
    {
        auto const& rows = kept[static_cast<size_t>(b)];
        for (int64_t place = 0; place < result.size; ++place)
        {
            bool const used = place < static_cast<int64_t>(rows.size());
            int64_t const row = used ? rows[static_cast<size_t>(place)] : -1;
            result.index.push_back(row);
            for (int64_t byte = 0; byte < drawn.rowBytes(); ++byte)
            {
                auto const from = static_cast<size_t>((b * drawn.rows + row) * drawn.rowBytes() + byte);
                result.compact.push_back(used ? drawn.tokens[from] : '\0');
            }
        }
    }
    return result;
}

template <typename T> void put(std::vector<T> const& values)
{
    if (!values.empty() && std::fwrite(values.data(), sizeof(T), values.size(), stdout) != values.size())
    {
        std::fprintf(stderr, "cannot write the cases\n");
        std::exit(1);
    }
}

// One record: B, M, P, D, type, size as int64, then threshold, tokens, scores, compact, index, length.
void write(Case const& drawn, Result const& result)
{
    put(std::vector<int64_t>{drawn.images, drawn.rows, drawn.prefix, drawn.width, drawn.type, result.size});
    put(std::vector<float>{drawn.threshold});
    put(drawn.tokens);
    put(drawn.scores);
    put(result.compact);
    put(result.index);
    put(result.length);
}

} // namespace

int main(int argc, char** argv)
{
    bool const writing = argc == 4 && std::strcmp(argv[3], "write") == 0;
    if (argc != 3 && !writing)
    {
        std::fprintf(stderr, "usage: %s CASES SEED [write]\n", argv[0]);
        return 2;
    }
    int64_t const count = std::atoll(argv[1]);
    Random random(static_cast<uint64_t>(std::atoll(argv[2])));
    if (asvit::refusal(0, 5, 4) == nullptr || asvit::refusal(1, 1, 0) == nullptr ||
        asvit::refusal(1, 5, 0) == nullptr || asvit::refusal(1, 5, 5) == nullptr || asvit::refusal(1, 5, 6) == nullptr)
    {
        std::fprintf(stderr, "a batch without an image, an image token or a prefix is not refused\n");
        return 1;
    }
    for (int64_t i = 0; i < count; ++i)
    {
        Case const drawn = draw(random);
        Result const result = tested(drawn);
        if (!(result == plain(drawn)))
        {
            std::fprintf(stderr, "case %lld: B %lld M %lld D %lld threshold %g differs\n", static_cast<long long>(i),
                         static_cast<long long>(drawn.images), static_cast<long long>(drawn.rows),
                         static_cast<long long>(drawn.width), static_cast<double>(drawn.threshold));
            return 1;
        }
        if (writing)
        {
            write(drawn, result);
        }
    }
    std::fprintf(stderr, "%lld cases equal\n", static_cast<long long>(count));
    return 0;
}
