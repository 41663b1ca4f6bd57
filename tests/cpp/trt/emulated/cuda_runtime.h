// Just enough of CUDA to run threshold_compact.cu on a CPU: every thread of a block is a fiber, and blocks run one
// after the other. It proves a kernel's arithmetic, its barriers and its bounds, and nothing about a GPU's time.
//
// There are four devices, one of which is current. A stream's handle is 4096 times its device's number plus anything
// below, and 0 is the current device's default stream, as in CUDA; a launch on another device's stream fails.
//
// Fibers go on in an order drawn anew at every step (ASVIT_ORDER seeds it), so that a missing barrier shows. A barrier
// or a warp's vote that some thread never reaches ends the process.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(threads)
#define __shared__ static

struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaError_t
{
    cudaSuccess = 0,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400
};

struct dim3
{
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

struct alignas(16) uint4
{
    uint32_t x, y, z, w;
};

struct cudaLaunchConfig_t
{
    dim3 gridDim, blockDim;
    cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, gridDim; // of the fiber that runs

namespace emulator
{

constexpr int kDEVICES = 4;
inline int device = 0; // the current one
inline uint64_t launches[kDEVICES];

// Notes a launch, or says why it fails.
inline cudaError_t launchOn(cudaStream_t stream)
{
    auto const handle = reinterpret_cast<uintptr_t>(stream);
    if (handle != 0 && handle / 4096 != static_cast<uintptr_t>(device))
    {
        return cudaErrorInvalidResourceHandle;
    }
    ++launches[device];
    return cudaSuccess;
}

constexpr unsigned kWARP = 32;
constexpr size_t kSTACK = 64 * 1024;

struct Warp
{
    uint64_t given[kWARP];
    uint64_t seen[kWARP];
    unsigned arrived = 0;
    uint64_t votes = 0;
};

struct Fiber
{
    ucontext_t context;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kSTACK);
    bool done = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline unsigned running = 0, arrived = 0;
inline uint64_t barriers = 0;
inline bool moved = false;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void yield()
{
    unsigned const me = running;
    swapcontext(&fibers[me].context, &scheduler);
}

template <typename Reached> void waitUntil(Reached reached)
{
    while (!reached())
    {
        yield();
    }
    moved = true;
}

// Every lane gives a value and sees those of all.
inline uint64_t const* exchange(uint64_t value)
{
    Warp& warp = warps[running / kWARP];
    uint64_t const vote = warp.votes;
    warp.given[running % kWARP] = value;
    moved = true;
    if (++warp.arrived == kWARP)
    {
        std::copy_n(warp.given, kWARP, warp.seen);
        warp.arrived = 0;
        ++warp.votes;
    }
    waitUntil([&] { return warp.votes != vote; });
    return warp.seen;
}

inline void enter()
{
    body();
    fibers[running].done = true;
    moved = true;
}

// Apart from its callers, since getcontext returns twice as far as a compiler knows.
[[gnu::noinline]] inline void prepare(Fiber& fiber)
{
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kSTACK;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, enter, 0);
}

inline void runBlock(dim3 size)
{
    static std::mt19937 random(std::getenv("ASVIT_ORDER") ? std::atoi(std::getenv("ASVIT_ORDER")) : 0);
    warps.assign(fibers.size() / kWARP, {});
    arrived = 0;
    std::for_each(fibers.begin(), fibers.end(), prepare);
    std::vector<unsigned> order(fibers.size());
    std::iota(order.begin(), order.end(), 0U);
    while (!order.empty())
    {
        moved = false;
        std::shuffle(order.begin(), order.end(), random);
        for (unsigned const i : order)
        {
            running = i;
            threadIdx = dim3(i % size.x, i / size.x, 0);
            swapcontext(&scheduler, &fibers[i].context);
        }
        order.erase(std::remove_if(order.begin(), order.end(), [](unsigned i) { return fibers[i].done; }), order.end());
        if (!moved)
        {
            std::fprintf(stderr, "emulator: a barrier or a vote that not every thread reaches\n");
            std::abort();
        }
    }
}

} // namespace emulator

inline void __syncthreads()
{
    uint64_t const barrier = emulator::barriers;
    emulator::moved = true;
    if (++emulator::arrived == emulator::fibers.size())
    {
        emulator::arrived = 0;
        ++emulator::barriers;
    }
    emulator::waitUntil([&] { return emulator::barriers != barrier; });
}

inline uint32_t __ballot_sync(uint32_t, bool vote)
{
    uint64_t const* const votes = emulator::exchange(vote);
    uint32_t bits = 0;
    for (unsigned lane = 0; lane < emulator::kWARP; ++lane)
    {
        bits |= static_cast<uint32_t>(votes[lane]) << lane;
    }
    return bits;
}

inline uint64_t __shfl_xor_sync(uint32_t, uint64_t value, int distance)
{
    return emulator::exchange(value)[threadIdx.x ^ static_cast<unsigned>(distance)];
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }

template <typename T> T atomicMax(T* place, T value)
{
    T const old = *place;
    *place = std::max(old, value);
    return old;
}

inline cudaError_t cudaMemsetAsync(void* place, int value, size_t bytes, cudaStream_t stream)
{
    if (cudaError_t const error = emulator::launchOn(stream))
    {
        return error;
    }
    std::memset(place, value, bytes);
    return cudaSuccess;
}

// For tests that load the kernel alone: which device is current, and how much each has done.
extern "C"
{
    [[gnu::used]] inline cudaError_t cudaSetDevice(int device)
    {
        if (device < 0 || device >= emulator::kDEVICES)
        {
            return cudaErrorInvalidDevice;
        }
        emulator::device = device;
        return cudaSuccess;
    }

    [[gnu::used]] inline uint64_t emulatorLaunches(int device) { return emulator::launches[device]; }
}

template <typename... Wanted, typename... Given>
cudaError_t cudaLaunchKernelEx(cudaLaunchConfig_t const* launch, void (*kernel)(Wanted...), Given... given)
{
    if (cudaError_t const error = emulator::launchOn(launch->stream))
    {
        return error;
    }
    emulator::fibers = std::vector<emulator::Fiber>(launch->blockDim.x * launch->blockDim.y);
    gridDim = launch->gridDim;
    emulator::body = [=] { kernel(given...); };
    for (unsigned y = 0; y < gridDim.y; ++y)
    {
        for (unsigned x = 0; x < gridDim.x; ++x)
        {
            blockIdx = dim3(x, y, 0);
            emulator::runBlock(launch->blockDim);
        }
    }
    return cudaSuccess;
}
