#include "ort_cuda.h"

#include <memory>
#include <string>

#include <cuda_runtime_api.h>

#include "kernels/threshold_compact.h"

namespace asvit
{

namespace
{

void requireCuda(int32_t status)
{
    if (status != 0)
    {
        auto const error = static_cast<cudaError_t>(status);
        throw Ort::Exception("ThresholdCompact on CUDA: " + std::string(cudaGetErrorString(error)), ORT_EP_FAIL);
    }
}

struct ReleaseAllocator
{
    void operator()(OrtAllocator* allocator) const { Ort::GetApi().ReleaseAllocator(allocator); }
};

// Device memory of the runtime's arena, which knows the kernel's stream: other streams get it when this one is done.
class Scratch
{
public:
    Scratch(Ort::KernelContext const& context, size_t bytes)
    {
        auto const place = context.GetInput(kTOKENS).GetTensorMemoryInfo();
        mAllocator.reset(context.GetAllocator(*place));
        Ort::ThrowOnError(
            Ort::GetApi().KernelContext_GetScratchBuffer(context.GetOrtKernelContext(), place, bytes, &mData));
    }
    ~Scratch() { mAllocator->Free(mAllocator.get(), mData); }
    Scratch(Scratch const&) = delete;
    Scratch& operator=(Scratch const&) = delete;

    void* data() const { return mData; }

private:
    std::unique_ptr<OrtAllocator, ReleaseAllocator> mAllocator;
    void* mData{};
};

int64_t readNumber(void const* device, cudaStream_t stream)
{
    int64_t number = 0;
    requireCuda(cudaMemcpyAsync(&number, device, sizeof number, cudaMemcpyDeviceToHost, stream));
    requireCuda(cudaStreamSynchronize(stream));
    return number;
}

} // namespace

void computeOnCuda(Ort::KernelContext const& context, int32_t elementBytes)
{
    auto const [images, rows, prefix, width] = checkedShape(context);
    require(rows <= kASVIT_MAX_ROWS, "on CUDA tokens may have at most 4096 rows an image");
    auto* const stream = static_cast<cudaStream_t>(context.GetGPUComputeStream());
    Scratch const workspace(context, asvitThresholdCompactWorkspace(images, rows));

    AsvitThresholdCompact call{};
    call.images = images;
    call.rows = rows;
    call.width = width;
    call.elementBytes = elementBytes;
    call.sizeBytes = sizeof(int64_t);
    call.tokens = context.GetInput(kTOKENS).GetTensorRawData();
    call.scores = context.GetInput(kSCORES).GetTensorData<float>();
    call.threshold = context.GetInput(kTHRESHOLD).GetTensorData<float>();
    call.length = outputOf<int64_t, 1>(context, kLENGTH, {images});
    call.size = outputOf<int64_t, 0>(context, kSIZE, {});
    call.workspace = workspace.data();
    call.prefix = prefix;
    requireCuda(asvitThresholdCompactCount(&call, stream));

    int64_t const size = readNumber(call.size, stream);
    call.compact = outputOf<void, 3>(context, kCOMPACT, {images, size, width});
    call.index = outputOf<int64_t, 2>(context, kINDEX, {images, size});
    requireCuda(asvitThresholdCompactGather(&call, stream));
}

} // namespace asvit
