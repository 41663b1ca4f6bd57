// asvit::ThresholdCompact for ONNX Runtime: a custom-op library that is not linked to ONNX Runtime.
//
// A kernel class gives kPROVIDER, kTYPE and ComputeV2. Kernels of other providers (CUDA) stand beside CpuKernel
// and are added in `Library`; inputs and outputs come from ThresholdCompactOp, so that all schemas agree.

// No static initialisation: the API arrives with RegisterCustomOps.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <array>
#include <atomic>
#include <cstdio>
#include <string>
#include <vector>

#include "threshold_compact.h"

static_assert(ORT_API_VERSION >= 17, "the headers of ONNX Runtime 1.17 or newer are needed");

#if defined(_WIN32)
#define ASVIT_EXPORT __declspec(dllexport)
#else
#define ASVIT_EXPORT __attribute__((visibility("default")))
#endif

namespace
{

enum Input : size_t
{
    kTOKENS,
    kSCORES,
    kTHRESHOLD,
    kINPUTS
};

enum Output : size_t
{
    kCOMPACT,
    kINDEX,
    kLENGTH,
    kSIZE,
    kOUTPUTS
};

// Runs `body` and turns whatever it throws into a status: nothing may be thrown into the runtime.
template <typename Body> OrtStatus* guarded(Body&& body) noexcept
{
    auto const status = [](char const* what, OrtErrorCode code) noexcept
    { return Ort::GetApi().CreateStatus(code, what); };
    try
    {
        body();
        return nullptr;
    }
    catch (Ort::Exception const& error)
    {
        return status(error.what(), error.GetOrtErrorCode());
    }
    catch (std::exception const& error)
    {
        return status(error.what(), ORT_RUNTIME_EXCEPTION);
    }
    catch (...)
    {
        return status("ThresholdCompact failed for an unknown reason", ORT_RUNTIME_EXCEPTION);
    }
}

void require(bool condition, char const* message)
{
    if (!condition)
    {
        throw Ort::Exception(message, ORT_INVALID_ARGUMENT);
    }
}

template <size_t kRANK> std::array<int64_t, kRANK> shapeOf(Ort::ConstValue const& value, char const* message)
{
    auto const info = value.GetTensorTypeAndShapeInfo();
    require(info.GetDimensionsCount() == kRANK, message);
    std::array<int64_t, kRANK> shape{};
    Ort::ThrowOnError(Ort::GetApi().GetDimensions(info, shape.data(), kRANK));
    return shape;
}

constexpr int64_t elementBytes(ONNXTensorElementDataType type)
{
    return type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
}

template <ONNXTensorElementDataType kPAYLOAD> struct CpuKernel
{
    static constexpr ONNXTensorElementDataType kTYPE = kPAYLOAD;
    static constexpr char const* kPROVIDER = nullptr; // ONNX Runtime's word for the CPU

    static asvit::Batch read(Ort::KernelContext const& context)
    {
        auto const tokens = context.GetInput(kTOKENS);
        auto const scores = context.GetInput(kSCORES);
        auto const threshold = context.GetInput(kTHRESHOLD);
        auto const shape = shapeOf<3>(tokens, "tokens must be [B, M, D]");
        char const* const refusal = asvit::refusal(shape[0], shape[1]);
        require(refusal == nullptr, refusal);
        char const* const misfit = "scores must be [B, M-1] for tokens [B, M, D]";
        require(shapeOf<2>(scores, misfit) == std::array{shape[0], shape[1] - 1}, misfit);
        require(threshold.GetTensorTypeAndShapeInfo().GetElementCount() == 1, "threshold must be one number");
        return {shape[0],
                shape[1],
                shape[2] * elementBytes(kTYPE),
                tokens.GetTensorRawData(),
                scores.GetTensorData<float>(),
                *threshold.GetTensorData<float>()};
    }

    template <typename T, size_t kRANK>
    static T* output(Ort::KernelContext const& context, size_t which, std::array<int64_t, kRANK> const& shape)
    {
        auto value = context.GetOutput(which, shape.data(), kRANK);
        require(value != nullptr, "every output of ThresholdCompact must have a name");
        return static_cast<T*>(value.GetTensorMutableRawData());
    }

    OrtStatus* ComputeV2(OrtKernelContext* raw) const noexcept
    {
        return guarded(
            [raw]
            {
                Ort::KernelContext const context(raw);
                asvit::Batch const batch = read(context);
                auto* const length = output<int64_t, 1>(context, kLENGTH, {batch.images});
                int64_t const size = asvit::measure(batch, length);
                *output<int64_t, 0>(context, kSIZE, {}) = size;
                int64_t const width = batch.rowBytes / elementBytes(kTYPE);
                auto* const compact = output<void, 3>(context, kCOMPACT, {batch.images, size, width});
                auto* const index = output<int64_t, 2>(context, kINDEX, {batch.images, size});
                asvit::fill(batch, length, size, compact, index);
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

// The ops and their domain: sessions only borrow them, so they live as long as the library is loaded.
struct Library
{
    ThresholdCompactOp<CpuKernel<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT>> mFloat;
    ThresholdCompactOp<CpuKernel<ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16>> mHalf;
    ThresholdCompactOp<CpuKernel<ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16>> mBfloat;
    Ort::CustomOpDomain mDomain{"asvit"};

    Library()
    {
        for (OrtCustomOp const* op : {static_cast<OrtCustomOp const*>(&mFloat), static_cast<OrtCustomOp const*>(&mHalf),
                                      static_cast<OrtCustomOp const*>(&mBfloat)})
        {
            mDomain.Add(op);
        }
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
