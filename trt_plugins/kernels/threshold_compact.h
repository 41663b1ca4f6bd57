// ThresholdCompact behind one plain function: no TensorRT, no ONNX Runtime, and no CUDA header to include this.
//
// Linked from threshold_compact.cu the buffers are in device memory and the work is put on `stream`; linked from
// threshold_compact_host.cpp (its host twin) they are in host memory and the work is done on return.
#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st; // what a cudaStream_t points to

// B images of M rows of D elements. Outputs have room for [B, M, D] and [B, M], and are filled densely as
// [B, size, D] and [B, size]: an image begins where the one before it ends, and what lies behind stays as it was.
struct AsvitThresholdCompact
{
    int64_t images;         // B, at least 1
    int64_t rows;           // M, 2 to kASVIT_MAX_ROWS; the prefix first
    int64_t width;          // D
    int32_t elementBytes;   // 2 or 4: half and bfloat16, or float
    int32_t sizeBytes;      // 4 or 8: `size` is int32 or int64
    void const* tokens;     // [B, M, D]
    float const* scores;    // [B, M-P]
    float const* threshold; // one number
    void* compact;          // [B, size, D]
    int64_t* index;         // [B, size]
    int64_t* length;        // [B]
    void* size;             // one number: the highest of `length`
    void* workspace;        // asvitThresholdCompactWorkspace bytes; nothing needs to be in it
    int64_t prefix;         // P, 1 to M-1: rows at the front of each image that always stay
};

constexpr int64_t kASVIT_MAX_ROWS = 4096;
constexpr int32_t kASVIT_BAD_CALL = -1;

extern "C"
{
    // Bytes of workspace that a call with B images of M rows needs, at most kASVIT_MAX_ROWS of them.
    size_t asvitThresholdCompactWorkspace(int64_t images, int64_t rows) noexcept;

    // Bytes of the description above, by which a caller in another language knows that it is the one it fills.
    int32_t asvitThresholdCompactCallBytes() noexcept;

    // 0, kASVIT_BAD_CALL for a call that the description above does not allow, or a cudaError_t. At most two kernels
    // and, for more than one image, a memset of `size` before them; no allocation and no waiting, so that a stream can
    // be captured. Equal inputs give equal bits.
    int32_t asvitThresholdCompact(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept;

    // The same in two steps, for a caller that allocates `compact` and `index` when it has read `size`. The first fills
    // `length`, `size` and the workspace and asks for nothing of `tokens`, `compact` and `index`; the second needs the
    // three as the first has left them. But `size` may name a higher number, at most M: that many rows are then filled
    // for every image, zeros and indices of -1 behind those that stay.
    int32_t asvitThresholdCompactCount(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept;
    int32_t asvitThresholdCompactGather(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept;
}
