// What the kernels of every provider share: the op's signature, checked inputs, outputs, and errors as statuses.
#pragma once

// No static initialisation: the API arrives with RegisterCustomOps.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <array>
#include <exception>

#include "threshold_compact.h"

static_assert(ORT_API_VERSION >= 17, "the headers of ONNX Runtime 1.17 or newer are needed");

namespace asvit
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

inline void require(bool condition, char const* message)
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

// The inputs' dimensions, once they fit each other.
struct Shape
{
    int64_t images; // B
    int64_t rows;   // M
    int64_t prefix; // P
    int64_t width;  // D
};

inline Shape checkedShape(Ort::KernelContext const& context)
{
    auto const shape = shapeOf<3>(context.GetInput(kTOKENS), "tokens must be [B, M, D]");
    char const* const misfit = "scores must be [B, M-P] for tokens [B, M, D]";
    auto const scores = shapeOf<2>(context.GetInput(kSCORES), misfit);
    require(scores[0] == shape[0], misfit);
    char const* const refused = refusal(shape[0], shape[1], scores[1]);
    require(refused == nullptr, refused);
    require(context.GetInput(kTHRESHOLD).GetTensorTypeAndShapeInfo().GetElementCount() == 1,
            "threshold must be one number");
    return {shape[0], shape[1], shape[1] - scores[1], shape[2]};
}

template <typename T, size_t kRANK>
T* outputOf(Ort::KernelContext const& context, size_t which, std::array<int64_t, kRANK> const& shape)
{
    auto value = context.GetOutput(which, shape.data(), kRANK);
    require(value != nullptr, "every output of ThresholdCompact must have a name");
    return static_cast<T*>(value.GetTensorMutableRawData());
}

} // namespace asvit
