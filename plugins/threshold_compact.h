// The kernel of asvit::ThresholdCompact on a CPU. Its contract stands in README.md beside it.
//
// No framework and no allocation: `measure` counts, the caller obtains outputs of that size, `fill` fills them.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

namespace asvit
{

// One call's inputs. B images of M rows, of which the first P always stay (class token first), each row `rowBytes`
// bytes of any type.
struct Batch
{
    int64_t images;      // B
    int64_t rows;        // M
    int64_t prefix;      // P
    int64_t rowBytes;    // D * sizeof(T)
    void const* tokens;  // [B, M, D]
    float const* scores; // [B, M-P]
    float threshold;

    int64_t imageTokens() const noexcept { return rows - prefix; }
};

// Why a batch of `rows` rows and as many scores an image is refused, or nullptr.
inline char const* refusal(int64_t images, int64_t rows, int64_t scores) noexcept
{
    if (images < 1)
    {
        return "the batch is empty; ThresholdCompact needs at least one image";
    }
    if (rows < 2)
    {
        return "tokens has fewer than two rows; ThresholdCompact needs the class token and an image token";
    }
    if (scores < 1)
    {
        return "scores has no columns; ThresholdCompact needs an image token behind the prefix";
    }
    if (scores >= rows)
    {
        return "scores must be [B, M-P] for tokens [B, M, D], and P, the rows before the image tokens, at least 1";
    }
    return nullptr;
}

// Whether a score ranks below another: number > NaN > -inf.
inline bool isBelow(float score, float other) noexcept
{
    constexpr float kPADDING = -std::numeric_limits<float>::infinity();
    if (score != score)
    {
        return other > kPADDING;
    }
    return score < other || (score == kPADDING && other != other);
}

// The highest of `count` scores, the first of equals.
inline int64_t bestOf(float const* scores, int64_t count) noexcept
{
    int64_t best = 0;
    for (int64_t i = 1; i < count; ++i)
    {
        if (isBelow(scores[best], scores[i]))
        {
            best = i;
        }
    }
    return best;
}

// Fills length [B] (kept rows of each image, prefix included) and returns its maximum.
inline int64_t measure(Batch const& batch, int64_t* length) noexcept
{
    int64_t const count = batch.imageTokens();
    int64_t size = 0;
    for (int64_t b = 0; b < batch.images; ++b)
    {
        float const* scores = batch.scores + b * count;
        int64_t above = 0;
        for (int64_t i = 0; i < count; ++i)
        {
            above += scores[i] > batch.threshold;
        }
        length[b] = batch.prefix + (above > 0 ? above : 1);
        size = length[b] > size ? length[b] : size;
    }
    return size;
}

// One image of `compact`: its kept rows, then zeros and indices of -1 up to `size`.
inline void fillImage(Batch const& batch, int64_t image, int64_t length, int64_t size, char* compact,
                      int64_t* index) noexcept
{
    int64_t const count = batch.imageTokens();
    float const* scores = batch.scores + image * count;
    char const* tokens = static_cast<char const*>(batch.tokens) + image * batch.rows * batch.rowBytes;
    // Whatever passes includes the best score. So one kept token is always the best one, also when nothing passes.
    int64_t const only = length == batch.prefix + 1 ? bestOf(scores, count) : -1;

    int64_t written = 0;
    auto copyRun = [&](int64_t begin, int64_t end) noexcept
    {
        if (batch.rowBytes > 0)
        {
            std::memcpy(compact + written * batch.rowBytes, tokens + begin * batch.rowBytes,
                        static_cast<size_t>((end - begin) * batch.rowBytes));
        }
        for (int64_t row = begin; row < end; ++row)
        {
            index[written++] = row;
        }
    };
    // Neighbours that stay are copied as one run: wide copies, few of them.
    int64_t begin = 0;
    for (int64_t row = batch.prefix; row < batch.rows; ++row)
    {
        int64_t const token = row - batch.prefix;
        bool const keep = only >= 0 ? token == only : scores[token] > batch.threshold;
        if (!keep)
        {
            if (begin < row)
            {
                copyRun(begin, row);
            }
            begin = row + 1;
        }
    }
    if (begin < batch.rows)
    {
        copyRun(begin, batch.rows);
    }

    if (written < size && batch.rowBytes > 0)
    {
        std::memset(compact + written * batch.rowBytes, 0, static_cast<size_t>((size - written) * batch.rowBytes));
    }
    while (written < size)
    {
        index[written++] = -1;
    }
}

// Fills compact [B, size, D] and index [B, size] from what `measure` gave.
inline void fill(Batch const& batch, int64_t const* length, int64_t size, void* compact, int64_t* index) noexcept
{
    for (int64_t b = 0; b < batch.images; ++b)
    {
        char* out = static_cast<char*>(compact) + b * size * batch.rowBytes;
        fillImage(batch, b, length[b], size, out, index + b * size);
    }
}

} // namespace asvit
