// Device memory and graphs, as the driver needs them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include <cuda_runtime.h>

constexpr int kPOISON = 0xA5;

inline void require(bool condition, char const* what)
{
    if (!condition)
    {
        std::fprintf(stderr, "gpu_driver: %s\n", what);
        std::exit(1);
    }
}

inline void check(cudaError_t error) { require(error == cudaSuccess, cudaGetErrorString(error)); }

// Device memory that begins `offset` bytes after an aligned place and ends where its allocation ends.
class Buffer
{
public:
    explicit Buffer(size_t bytes, size_t offset = 0) : mBytes(bytes), mOffset(offset)
    {
        check(cudaMalloc(&mMemory, std::max<size_t>(bytes + offset, 1)));
        poison();
    }
    Buffer(Buffer&& other) noexcept : mBytes(other.mBytes), mOffset(other.mOffset), mMemory(other.mMemory)
    {
        other.mMemory = nullptr;
    }
    ~Buffer() { cudaFree(mMemory); }

    void* data() const { return static_cast<char*>(mMemory) + mOffset; }
    size_t bytes() const { return mBytes; }
    void poison() const { check(cudaMemset(data(), kPOISON, mBytes)); }
    void put(void const* host) const { check(cudaMemcpy(data(), host, mBytes, cudaMemcpyHostToDevice)); }

    std::vector<char> get() const
    {
        std::vector<char> host(mBytes);
        check(cudaMemcpy(host.data(), data(), mBytes, cudaMemcpyDeviceToHost));
        return host;
    }

private:
    size_t mBytes;
    size_t mOffset;
    void* mMemory{};
};

class Stream
{
public:
    Stream() { check(cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking)); }
    Stream(Stream const&) = delete;
    ~Stream() { cudaStreamDestroy(mStream); }

    operator cudaStream_t() const { return mStream; }
    void wait() const { check(cudaStreamSynchronize(mStream)); }

private:
    cudaStream_t mStream{};
};

class Graph
{
public:
    Graph(cudaStream_t stream, std::function<void()> body) : mBody(std::move(body))
    {
        cudaGraph_t graph{};
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        mBody();
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&mGraph, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    Graph(Graph const&) = delete;
    ~Graph() { cudaGraphExecDestroy(mGraph); }

    void launch(cudaStream_t stream) const
    {
#ifdef ASVIT_EMULATED // over host memory a capture has run the work and kept nothing
        mBody();
#endif
        check(cudaGraphLaunch(mGraph, stream));
    }

private:
    std::function<void()> mBody;
    cudaGraphExec_t mGraph{};
};
