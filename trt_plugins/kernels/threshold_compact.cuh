// What the CUDA kernels and their host twin must agree on.
#pragma once

#include <cstring>

#include "threshold_compact.h"

#if defined(__CUDACC__)
#define ASVIT_BOTH __host__ __device__ inline
#else
#define ASVIT_BOTH inline
#endif

namespace asvit
{

// A kept row's place in its image; kASVIT_MAX_ROWS fit.
using Row = uint16_t;

// Only a number passes, and only against a number.
ASVIT_BOTH bool keeps(float score, float threshold) { return score > threshold; }

// Higher for the better token: the higher score, then the lower index; number > NaN > -inf. Never 0.
ASVIT_BOTH uint64_t rankOf(float score, uint32_t token)
{
    constexpr uint32_t kSIGN = 0x80000000U;
    constexpr uint32_t kNAN = 0x007FFFFFU; // what -inf would give: no number lies lower
    uint32_t bits = 0; // both zeros are equal
    if (score != 0.0F)
    {
        memcpy(&bits, &score, sizeof bits);
    }
    uint32_t const number = (bits & kSIGN) != 0 ? ~bits : bits | kSIGN;
    uint32_t const order = number > kNAN ? number : 0U;
    return (static_cast<uint64_t>(score != score ? kNAN : order) << 32U) | ~token;
}

// The token of a rank.
ASVIT_BOTH uint32_t tokenOf(uint64_t rank) { return ~static_cast<uint32_t>(rank); }

// Kept rows of an image of which `above` tokens pass: the prefix and at least one more.
ASVIT_BOTH uint32_t lengthOf(uint32_t prefix, uint32_t above) { return prefix + (above > 0 ? above : 1); }

// What counting needs of a call.
inline bool countable(AsvitThresholdCompact const& call)
{
    bool const shape = call.images >= 1 && call.images <= INT32_MAX && call.rows >= 2 && call.rows <= kASVIT_MAX_ROWS;
    bool const prefix = call.prefix >= 1 && call.prefix < call.rows;
    bool const size = call.sizeBytes == 4 || call.sizeBytes == 8;
    return shape && prefix && size && call.scores != nullptr && call.threshold != nullptr && call.length != nullptr &&
           call.size != nullptr && call.workspace != nullptr;
}

// What the whole call needs.
inline bool allowed(AsvitThresholdCompact const& call)
{
    bool const width = call.width >= 0 && call.width <= INT32_MAX / 4;
    bool const type = call.elementBytes == 2 || call.elementBytes == 4;
    bool const payload = call.width == 0 || (call.tokens != nullptr && call.compact != nullptr);
    return countable(call) && width && type && payload && call.index != nullptr;
}

inline size_t workspaceBytes(int64_t images, int64_t rows)
{
    if (images < 1 || rows < 1)
    {
        return 0; // such a call is refused
    }
    return static_cast<size_t>(images) * static_cast<size_t>(rows) * sizeof(Row);
}

} // namespace asvit
