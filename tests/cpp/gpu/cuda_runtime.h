// CUDA's runtime over host memory, as far as scripts/gpu_driver.cu asks: its protocol can then be run without a GPU.
// Work is done when it is put on a stream; so a graph holds nothing (the driver does its work again), and time is not
// measured.
#pragma once

#define ASVIT_EMULATED

#include <cstdlib>
#include <cstring>

#include "cuda_runtime_api.h"

using cudaGraph_t = void*;
using cudaGraphExec_t = void*;
enum cudaError_t
{
    cudaSuccess
};
enum cudaMemcpyKind
{
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice
};
constexpr unsigned cudaStreamNonBlocking = 1;
constexpr int cudaStreamCaptureModeGlobal = 0;

inline char const* cudaGetErrorString(cudaError_t) { return "no error is ever given"; }

template <typename T> cudaError_t cudaMalloc(T** place, size_t bytes)
{
    *place = static_cast<T*>(std::malloc(bytes));
    return cudaSuccess;
}

inline cudaError_t cudaFree(void* place)
{
    std::free(place);
    return cudaSuccess;
}

inline cudaError_t cudaMemset(void* place, int value, size_t bytes)
{
    std::memset(place, value, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpy(void* to, void const* from, size_t bytes, cudaMemcpyKind)
{
    std::memcpy(to, from, bytes);
    return cudaSuccess;
}

inline cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t)
{
    return cudaMemcpy(to, from, bytes, kind);
}

inline cudaError_t cudaGetDeviceCount(int* count)
{
    *count = 1;
    return cudaSuccess;
}

inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t)
{
    *milliseconds = 1;
    return cudaSuccess;
}

template <typename T> cudaError_t nothing(T* handle)
{
    *handle = nullptr;
    return cudaSuccess;
}

inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return nothing(stream); }
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return nothing(event); }
inline cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) { return nothing(graph); }
inline cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t, int) { return nothing(made); }
inline cudaError_t cudaStreamBeginCapture(cudaStream_t, int) { return cudaSuccess; }
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
