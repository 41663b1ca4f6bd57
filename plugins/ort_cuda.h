// ThresholdCompact for ONNX Runtime's CUDA provider. Inputs and outputs are in device memory; no CUDA header here.
#pragma once

#include "ort_kernel.h"

static_assert(ORT_API_VERSION >= 18, "CUDA kernels need the headers of ONNX Runtime 1.18 or newer");

namespace asvit
{

// One call of the op whose payload has elements of that size. Waits for the device once: the outputs' shapes depend on
// what it counts.
void computeOnCuda(Ort::KernelContext const& context, int32_t elementBytes);

template <ONNXTensorElementDataType kPAYLOAD> struct CudaKernel
{
    static constexpr ONNXTensorElementDataType kTYPE = kPAYLOAD;
    static constexpr char const* kPROVIDER = "CUDAExecutionProvider";

    OrtStatus* ComputeV2(OrtKernelContext* raw) const noexcept
    {
        return guarded([raw] { computeOnCuda(Ort::KernelContext(raw), static_cast<int32_t>(elementBytes(kTYPE))); });
    }
};

} // namespace asvit
