// ThresholdCompact on CUDA. The dense output's stride is known when every image is counted, hence two kernels: one
// counts and lists the rows that stay, the other copies them. Nothing depends on the order in which blocks run.
#include <cuda_runtime.h>

#include "threshold_compact.cuh"

namespace
{

using asvit::Row;

constexpr uint32_t kALL = 0xFFFFFFFFU;
constexpr int kWARP = 32;
constexpr int kCOUNT_WARPS = 8;  // of a block, which counts one image
constexpr int kGATHER_WARPS = 4; // of a block, each of which copies one row
constexpr int kIN_FLIGHT = 4;    // words that a lane loads before it stores

__device__ uint64_t bestOfWarp(uint64_t rank)
{
    for (int distance = kWARP / 2; distance > 0; distance /= 2)
    {
        uint64_t const other = __shfl_xor_sync(kALL, rank, distance);
        rank = other > rank ? other : rank;
    }
    return rank;
}

__device__ void raiseTo(int32_t* size, uint32_t length) { atomicMax(size, static_cast<int32_t>(length)); }

__device__ void raiseTo(int64_t* size, uint32_t length)
{
    static_assert(sizeof(unsigned long long) == sizeof(int64_t), "CUDA's 64-bit atomics take unsigned long long");
    atomicMax(reinterpret_cast<unsigned long long*>(size), static_cast<unsigned long long>(length));
}

// Block b lists in rows [B, M] what stays of image b: the prefix, then image tokens, of which its warps take
// neighbouring runs, in their order.
// `size` must hold 0 where there is more than one image.
template <typename Size>
__global__ void __launch_bounds__(kCOUNT_WARPS* kWARP)
    countAndScan(float const* __restrict__ scores, float const* __restrict__ threshold, int tokens, int prefix,
                 Row* __restrict__ rows, int64_t* __restrict__ length, Size* size)
{
    __shared__ uint32_t warpAbove[kCOUNT_WARPS];
    __shared__ uint64_t warpBest[kCOUNT_WARPS];
    int const lane = static_cast<int>(threadIdx.x);
    int const warp = static_cast<int>(threadIdx.y);
    int64_t const image = blockIdx.x;
    scores += image * tokens;
    rows += image * (prefix + tokens);
    for (int row = warp * kWARP + lane; row < prefix; row += kCOUNT_WARPS * kWARP)
    {
        rows[row] = static_cast<Row>(row);
    }
    rows += prefix; // where the image tokens that stay begin

    float const limit = *threshold;
    int const run = (tokens + kCOUNT_WARPS * kWARP - 1) / (kCOUNT_WARPS * kWARP) * kWARP;
    int const begin = warp * run;
    int const end = begin + run < tokens ? begin + run : tokens;
    uint32_t above = 0;
    uint64_t best = 0;
    for (int first = begin; first < end; first += kWARP)
    {
        int const token = first + lane;
        bool keep = false;
        if (token < end)
        {
            float const score = scores[token];
            keep = asvit::keeps(score, limit);
            uint64_t const rank = asvit::rankOf(score, static_cast<uint32_t>(token));
            best = rank > best ? rank : best;
        }
        above += static_cast<uint32_t>(__popc(__ballot_sync(kALL, keep)));
    }
    best = bestOfWarp(best);
    if (lane == 0)
    {
        warpAbove[warp] = above;
        warpBest[warp] = best;
    }
    __syncthreads();

    uint32_t before = 0;
    uint32_t total = 0;
    for (int other = 0; other < kCOUNT_WARPS; ++other)
    {
        before += other < warp ? warpAbove[other] : 0;
        total += warpAbove[other];
        best = warpBest[other] > best ? warpBest[other] : best;
    }
    for (int first = begin; first < end; first += kWARP)
    {
        int const token = first + lane;
        bool const keep = token < end && asvit::keeps(scores[token], limit);
        uint32_t const kept = __ballot_sync(kALL, keep);
        if (keep)
        {
            uint32_t const lower = kept & ((1U << lane) - 1U);
            rows[before + static_cast<uint32_t>(__popc(lower))] = static_cast<Row>(prefix + token);
        }
        before += static_cast<uint32_t>(__popc(kept));
    }
    if (warp == 0 && lane == 0)
    {
        uint32_t const mine = asvit::lengthOf(static_cast<uint32_t>(prefix), total);
        if (total == 0)
        {
            rows[0] = static_cast<Row>(static_cast<uint32_t>(prefix) + asvit::tokenOf(best));
        }
        length[image] = mine;
        if (gridDim.x == 1)
        {
            *size = static_cast<Size>(mine);
        }
        else
        {
            raiseTo(size, mine);
        }
    }
}

// One warp fills one row of compact [B, size, D] and index [B, size]; there are warps for [B, M].
template <typename Word, typename Size>
__global__ void __launch_bounds__(kGATHER_WARPS* kWARP)
    gather(Word const* __restrict__ tokens, Row const* __restrict__ rows, int64_t const* __restrict__ length,
           Size const* __restrict__ size, int rowsOfImage, int words, Word* __restrict__ compact,
           int64_t* __restrict__ index)
{
    int const lane = static_cast<int>(threadIdx.x);
    int64_t const image = blockIdx.x;
    int64_t const stride = *size;
    int64_t const row = static_cast<int64_t>(blockIdx.y) * kGATHER_WARPS + threadIdx.y;
    if (row >= stride)
    {
        return;
    }
    bool const kept = row < length[image];
    int64_t const source = kept ? rows[image * rowsOfImage + row] : -1;
    if (lane == 0)
    {
        index[image * stride + row] = source;
    }
    Word* const to = compact + (image * stride + row) * words;
    Word const* const from = tokens + (image * rowsOfImage + (kept ? source : 0)) * words;
    for (int first = lane; first < words; first += kIN_FLIGHT * kWARP)
    {
        Word batch[kIN_FLIGHT] = {};
#pragma unroll
        for (int i = 0; i < kIN_FLIGHT; ++i)
        {
            if (kept && first + i * kWARP < words)
            {
                batch[i] = from[first + i * kWARP];
            }
        }
#pragma unroll
        for (int i = 0; i < kIN_FLIGHT; ++i)
        {
            if (first + i * kWARP < words)
            {
                to[first + i * kWARP] = batch[i];
            }
        }
    }
}

cudaLaunchConfig_t config(dim3 grid, int warps, cudaStream_t stream)
{
    cudaLaunchConfig_t launch{};
    launch.gridDim = grid;
    launch.blockDim = dim3(kWARP, static_cast<unsigned>(warps));
    launch.stream = stream;
    return launch;
}

template <typename Size> cudaError_t launchCount(AsvitThresholdCompact const& call, cudaStream_t stream)
{
    auto* const size = static_cast<Size*>(call.size);
    if (call.images > 1)
    {
        if (cudaError_t const error = cudaMemsetAsync(size, 0, sizeof(Size), stream))
        {
            return error;
        }
    }
    cudaLaunchConfig_t const launch = config(dim3(static_cast<unsigned>(call.images)), kCOUNT_WARPS, stream);
    auto const prefix = static_cast<int>(call.prefix);
    return cudaLaunchKernelEx(&launch, countAndScan<Size>, call.scores, call.threshold,
                              static_cast<int>(call.rows) - prefix, prefix, static_cast<Row*>(call.workspace),
                              call.length, size);
}

template <typename Word, typename Size> cudaError_t launchGather(AsvitThresholdCompact const& call, cudaStream_t stream)
{
    int64_t const words = call.width * call.elementBytes / static_cast<int64_t>(sizeof(Word));
    auto const blocks = static_cast<unsigned>((call.rows + kGATHER_WARPS - 1) / kGATHER_WARPS);
    cudaLaunchConfig_t const launch = config(dim3(static_cast<unsigned>(call.images), blocks), kGATHER_WARPS, stream);
    return cudaLaunchKernelEx(&launch, gather<Word, Size>, static_cast<Word const*>(call.tokens),
                              static_cast<Row const*>(call.workspace), static_cast<int64_t const*>(call.length),
                              static_cast<Size const*>(call.size), static_cast<int>(call.rows), static_cast<int>(words),
                              static_cast<Word*>(call.compact), call.index);
}

template <typename Size> cudaError_t launchWidest(AsvitThresholdCompact const& call, cudaStream_t stream)
{
    // The widest word that divides every row's place in both buffers.
    uint64_t const places = reinterpret_cast<uintptr_t>(call.tokens) | reinterpret_cast<uintptr_t>(call.compact) |
                            static_cast<uint64_t>(call.width * call.elementBytes);
    if (places % sizeof(uint4) == 0)
    {
        return launchGather<uint4, Size>(call, stream);
    }
    if (places % sizeof(uint32_t) == 0)
    {
        return launchGather<uint32_t, Size>(call, stream);
    }
    return launchGather<uint16_t, Size>(call, stream);
}

} // namespace

size_t asvitThresholdCompactWorkspace(int64_t images, int64_t rows) noexcept
{
    return asvit::workspaceBytes(images, rows);
}

int32_t asvitThresholdCompactCallBytes() noexcept { return sizeof(AsvitThresholdCompact); }

int32_t asvitThresholdCompactCount(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept
{
    if (!asvit::countable(*call))
    {
        return kASVIT_BAD_CALL;
    }
    return call->sizeBytes == 8 ? launchCount<int64_t>(*call, stream) : launchCount<int32_t>(*call, stream);
}

int32_t asvitThresholdCompactGather(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept
{
    if (!asvit::allowed(*call))
    {
        return kASVIT_BAD_CALL;
    }
    return call->sizeBytes == 8 ? launchWidest<int64_t>(*call, stream) : launchWidest<int32_t>(*call, stream);
}

int32_t asvitThresholdCompact(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept
{
    if (!asvit::allowed(*call))
    {
        return kASVIT_BAD_CALL;
    }
    int32_t const status = asvitThresholdCompactCount(call, stream);
    return status == 0 ? asvitThresholdCompactGather(call, stream) : status;
}
