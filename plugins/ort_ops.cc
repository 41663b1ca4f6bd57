// asvit::ThresholdCompact for ONNX Runtime: a custom-op library that is not linked to ONNX Runtime.
//
// A kernel class gives kPROVIDER, kTYPE and ComputeV2, and is added in `Library`; inputs and outputs come from
// ThresholdCompactOp, so that all schemas agree. The CUDA kernels are there where ASVIT_CUDA is defined.
#include "ort_kernel.h"

#include <atomic>
#include <cstdio>
#include <string>
#include <tuple>
#include <vector>

#if defined(ASVIT_CUDA)
#include "ort_cuda.h"
#endif

#if defined(_WIN32)
#define ASVIT_EXPORT __declspec(dllexport)
#else
#define ASVIT_EXPORT __attribute__((visibility("default")))
#endif

namespace
{

using namespace asvit;

template <ONNXTensorElementDataType kPAYLOAD> struct CpuKernel
{
    static constexpr ONNXTensorElementDataType kTYPE = kPAYLOAD;
    static constexpr char const* kPROVIDER = nullptr; // ONNX Runtime's word for the CPU

    OrtStatus* ComputeV2(OrtKernelContext* raw) const noexcept
    {
        return guarded(
            [raw]
            {
                Ort::KernelContext const context(raw);
                auto const [images, rows, prefix, width] = checkedShape(context);
                Batch const batch{images,
                                  rows,
                                  prefix,
                                  width * elementBytes(kTYPE),
                                  context.GetInput(kTOKENS).GetTensorRawData(),
                                  context.GetInput(kSCORES).GetTensorData<float>(),
                                  *context.GetInput(kTHRESHOLD).GetTensorData<float>()};
                auto* const length = outputOf<int64_t, 1>(context, kLENGTH, {images});
                int64_t const size = measure(batch, length);
                *outputOf<int64_t, 0>(context, kSIZE, {}) = size;
                auto* const compact = outputOf<void, 3>(context, kCOMPACT, {images, size, width});
                auto* const index = outputOf<int64_t, 2>(context, kINDEX, {images, size});
                fill(batch, length, size, compact, index);
            });
    }
};

// A dimension whose value is not known is -1 and has a name.
struct Dimension
{
    int64_t value;
    std::string name;
};

// A name that no other dimension bears: ONNX Runtime takes equal names for equal sizes when it plans which buffers to
// share.
Dimension unknownDimension()
{
    static std::atomic<uint64_t> fresh{0};
    return {-1, "asvit_" + std::to_string(fresh++)};
}

// What is known of an input; no dimensions at all where its rank is not known.
struct Known
{
    ONNXTensorElementDataType type;
    std::vector<Dimension> shape;
};

Known inputOf(OrtShapeInferContext* context, size_t which)
{
    OrtTensorTypeAndShapeInfo* raw = nullptr; // the context owns it
    Ort::ThrowOnError(Ort::GetApi().ShapeInferContext_GetInputTypeShape(context, which, &raw));
    Ort::ConstTensorTypeAndShapeInfo const info(raw);
    std::vector<int64_t> const values = info.GetShape();
    std::vector<char const*> names(values.size());
    info.GetSymbolicDimensions(names.data(), names.size());
    Known known{info.GetElementType(), {}};
    for (size_t i = 0; i < values.size(); ++i)
    {
        bool const anonymous = values[i] < 0 && *names[i] == '\0';
        known.shape.push_back(anonymous ? unknownDimension() : Dimension{values[i], names[i]});
    }
    return known;
}

// Not Ort::ShapeInferContext::SetOutputShape, which marks a named dimension with -2: ONNX Runtime refuses that.
void setOutput(OrtShapeInferContext* context, size_t which, Known const& known)
{
    OrtApi const& api = Ort::GetApi();
    std::vector<int64_t> values;
    std::vector<char const*> names;
    for (Dimension const& dimension : known.shape)
    {
        values.push_back(dimension.value);
        names.push_back(dimension.name.c_str());
    }
    OrtTensorTypeAndShapeInfo* raw = nullptr;
    Ort::ThrowOnError(api.CreateTensorTypeAndShapeInfo(&raw));
    Ort::TensorTypeAndShapeInfo const info(raw);
    Ort::ThrowOnError(api.SetTensorElementType(raw, known.type));
    Ort::ThrowOnError(api.SetDimensions(raw, values.data(), values.size()));
    Ort::ThrowOnError(api.SetSymbolicDimensions(raw, names.data(), names.size()));
    Ort::ThrowOnError(api.ShapeInferContext_SetOutputTypeShape(context, which, raw));
}

// The type is taken from the input: ONNX Runtime asks one op of the three on behalf of all.
void inferShapes(OrtShapeInferContext* context)
{
    constexpr auto kINT64 = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    Known const tokens = inputOf(context, kTOKENS);
    setOutput(context, kSIZE, {kINT64, {}});
    if (tokens.shape.size() != 3)
    {
        return;
    }
    Dimension const images = tokens.shape[0];
    Dimension const size = unknownDimension();
    setOutput(context, kCOMPACT, {tokens.type, {images, size, tokens.shape[2]}});
    setOutput(context, kINDEX, {kINT64, {images, size}});
    setOutput(context, kLENGTH, {kINT64, {images}});
}

template <typename Kernel> struct ThresholdCompactOp : Ort::CustomOpBase<ThresholdCompactOp<Kernel>, Kernel, true>
{
    ThresholdCompactOp()
    {
        // The base's own wrapper may throw into the runtime.
        OrtCustomOp::InferOutputShapeFn = [](OrtCustomOp const*, OrtShapeInferContext* raw) -> OrtStatus*
        { return guarded([raw] { inferShapes(raw); }); };
    }

    OrtStatus* CreateKernelV2(OrtApi const&, OrtKernelInfo const*, void** kernel) const noexcept
    {
        return guarded([kernel] { *kernel = new Kernel(); });
    }

    char const* GetName() const noexcept { return "ThresholdCompact"; }

    char const* GetExecutionProviderType() const noexcept { return Kernel::kPROVIDER; }

    size_t GetInputTypeCount() const noexcept { return kINPUTS; }

    ONNXTensorElementDataType GetInputType(size_t which) const noexcept
    {
        return which == kTOKENS ? Kernel::kTYPE : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }

    size_t GetOutputTypeCount() const noexcept { return kOUTPUTS; }

    ONNXTensorElementDataType GetOutputType(size_t which) const noexcept
    {
        return which == kCOMPACT ? Kernel::kTYPE : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    }
};

template <template <ONNXTensorElementDataType> typename Kernel>
using OpsOf = std::tuple<ThresholdCompactOp<Kernel<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>>,
                         ThresholdCompactOp<Kernel<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>>,
                         ThresholdCompactOp<Kernel<ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>>>;

// The ops and their domain: sessions only borrow them, so they live as long as the library is loaded.
// Without the CPU kernels a session on the CPU would find none: the op registered here hides the model's function.
struct Library
{
    OpsOf<CpuKernel> mCpu;
#if defined(ASVIT_CUDA)
    OpsOf<CudaKernel> mCuda;
#endif
    Ort::CustomOpDomain mDomain{"asvit"};

    Library()
    {
        auto const add = [this](auto const&... ops) { (mDomain.Add(&ops), ...); };
        std::apply(add, mCpu);
#if defined(ASVIT_CUDA)
        std::apply(add, mCuda);
#endif
    }
};

} // namespace

extern "C" ASVIT_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, OrtApiBase const* base)
{
    OrtApi const* const api = base->GetApi(ORT_API_VERSION);
    if (api == nullptr)
    {
        // Version 1 is in every ONNX Runtime, and CreateStatus in version 1.
        static constexpr char kFORMAT[] =
            "this custom op library needs ONNX Runtime API %d, which ONNX Runtime %s lacks";
        std::array<char, 160> message{};
        std::snprintf(message.data(), message.size(), kFORMAT, ORT_API_VERSION, base->GetVersionString());
        return base->GetApi(1)->CreateStatus(ORT_FAIL, message.data());
    }
    Ort::InitApi(api);
    return guarded(
        [options]
        {
            static Library library;
            Ort::UnownedSessionOptions(options).Add(library.mDomain);
        });
}
