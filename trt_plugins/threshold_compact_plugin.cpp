#include "threshold_compact_plugin.h"

#include <algorithm>
#include <limits>
#include <new>

#include "kernels/threshold_compact.h"

using namespace nvinfer1;

namespace asvit
{

namespace
{

// What the ONNX node names: op type, plugin_version, plugin_namespace.
constexpr char const* kNAME = "ThresholdCompact";
constexpr char const* kVERSION = "1";
constexpr char const* kNAMESPACE = "";

constexpr int32_t kFAILED = -1;
constexpr int64_t kMAX_IMAGES = std::numeric_limits<int32_t>::max(); // a kernel's grid

bool isPayload(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

// The type at a position of inputs and outputs together, of which only the payload's can be chosen.
bool isTypeAt(int32_t position, DynamicPluginTensorDesc const* inOut)
{
    DataType const type = inOut[position].desc.type;
    switch (position)
    {
    case kTOKENS:
        return isPayload(type);
    case kSCORES:
    case kTHRESHOLD:
        return type == DataType::kFLOAT;
    case kINPUTS + kCOMPACT:
        return type == inOut[kTOKENS].desc.type;
    case kINPUTS + kINDEX:
    case kINPUTS + kLENGTH:
        return type == DataType::kINT64;
    case kINPUTS + kSIZE:
        return type == kSIZE_TYPE;
    default:
        return false;
    }
}

// A dimension's upper bound where TensorRT knows one within `limit`, else `limit`: behind another plugin of
// data-dependent shape it may say -1.
int64_t boundOf(int64_t most, int64_t limit) { return most < 0 ? limit : std::min(most, limit); }

// Whether a dimension may lie from `least` to `most`: one that is not known (-1) may.
bool mayLie(int64_t size, int64_t least, int64_t most) { return size == -1 || (size >= least && size <= most); }

// Whether tokens of `rows` rows may have that many scores an image: what is left of the rows, one at least, is the
// prefix.
bool mayLeavePrefix(int64_t rows, int64_t scores)
{
    return scores == -1 || (scores >= 1 && (rows == -1 || scores < rows));
}

// Whether inputs of these upper bounds may be those of the op; bounds need not be known, nor fit each other.
bool mayReach(Dims const& tokens, Dims const& scores, Dims const& threshold)
{
    return tokens.nbDims == 3 && scores.nbDims == 2 && threshold.nbDims <= 1 &&
           (threshold.nbDims == 0 || mayLie(threshold.d[0], 1, 1)) && mayLie(tokens.d[0], 1, kMAX_IMAGES) &&
           mayLie(tokens.d[1], 2, kASVIT_MAX_ROWS) && mayLeavePrefix(-1, scores.d[1]);
}

// Whether inputs of these shapes may be those of the op; dimensions need not be known.
bool mayBe(Dims const& tokens, Dims const& scores, Dims const& threshold)
{
    return mayReach(tokens, scores, threshold) && mayLeavePrefix(tokens.d[1], scores.d[1]);
}

// Whether inputs of these shapes are those of the op: what a kernel reads then lies within them.
bool are(Dims const& tokens, Dims const& scores, Dims const& threshold)
{
    return mayBe(tokens, scores, threshold) && tokens.d[0] == scores.d[0] && tokens.d[1] > 0 && scores.d[1] > 0;
}

// Whether what is known while a network is made rules out that these are the rows and scores of the op.
bool cannotBe(IDimensionExpr const& rows, IDimensionExpr const& scores)
{
    auto const known = [](IDimensionExpr const& one) { return one.isConstant() ? one.getConstantValue() : -1; };
    return !mayLeavePrefix(known(rows), known(scores));
}

// The P+K that TensorRT tunes the layers behind for: 7 of 10 rows, what a stage of AS-ViT keeps at a usual budget.
IDimensionExpr const* optimum(IDimensionExpr const& rows, IExprBuilder& builder)
{
    if (rows.isSizeTensor())
    {
        return builder.constant(98); // may not depend on a size tensor: half the rows of a picture of 224 pixels
    }
    IDimensionExpr const* const part = builder.operation(DimensionOperation::kPROD, rows, *builder.constant(7));
    return builder.operation(DimensionOperation::kCEIL_DIV, *part, *builder.constant(10));
}

} // namespace

IPluginCapability* ThresholdCompactPlugin::getCapabilityInterface(PluginCapabilityType type) noexcept
{
    switch (type)
    {
    case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
    case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
    case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

IPluginV3* ThresholdCompactPlugin::clone() noexcept { return new (std::nothrow) ThresholdCompactPlugin(*this); }

AsciiChar const* ThresholdCompactPlugin::getPluginName() const noexcept { return kNAME; }

AsciiChar const* ThresholdCompactPlugin::getPluginVersion() const noexcept { return kVERSION; }

AsciiChar const* ThresholdCompactPlugin::getPluginNamespace() const noexcept { return kNAMESPACE; }

int32_t ThresholdCompactPlugin::getNbOutputs() const noexcept { return kOUTPUTS; }

int32_t ThresholdCompactPlugin::getOutputDataTypes(DataType* outputs, int32_t nbOutputs, DataType const* inputs,
                                                   int32_t nbInputs) const noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS)
    {
        return kFAILED;
    }
    outputs[kCOMPACT] = inputs[kTOKENS];
    outputs[kINDEX] = DataType::kINT64;
    outputs[kLENGTH] = DataType::kINT64;
    outputs[kSIZE] = kSIZE_TYPE;
    return 0;
}

int32_t ThresholdCompactPlugin::getOutputShapes(DimsExprs const* inputs, int32_t nbInputs, DimsExprs const*, int32_t,
                                                DimsExprs* outputs, int32_t nbOutputs, IExprBuilder& builder) noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS || inputs[kTOKENS].nbDims != 3 || inputs[kSCORES].nbDims != 2)
    {
        return kFAILED;
    }
    IDimensionExpr const* const images = inputs[kTOKENS].d[0];
    IDimensionExpr const* const rows = inputs[kTOKENS].d[1];
    if (cannotBe(*rows, *inputs[kSCORES].d[1]))
    {
        return kFAILED;
    }
    IDimensionExpr const* const size = builder.declareSizeTensor(kSIZE, *optimum(*rows, builder), *rows);

    outputs[kCOMPACT].nbDims = 3;
    outputs[kCOMPACT].d[0] = images;
    outputs[kCOMPACT].d[1] = size;
    outputs[kCOMPACT].d[2] = inputs[kTOKENS].d[2];
    outputs[kINDEX].nbDims = 2;
    outputs[kINDEX].d[0] = images;
    outputs[kINDEX].d[1] = size;
    outputs[kLENGTH].nbDims = 1;
    outputs[kLENGTH].d[0] = images;
    outputs[kSIZE].nbDims = 0;
    return 0;
}

bool ThresholdCompactPlugin::supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* inOut,
                                                       int32_t nbInputs, int32_t nbOutputs) noexcept
{
    return nbInputs == kINPUTS && nbOutputs == kOUTPUTS && inOut[position].desc.format == PluginFormat::kLINEAR &&
           isTypeAt(position, inOut);
}

int32_t ThresholdCompactPlugin::configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t nbInputs,
                                                DynamicPluginTensorDesc const*, int32_t nbOutputs) noexcept
{
    if (nbInputs != kINPUTS || nbOutputs != kOUTPUTS)
    {
        return kFAILED;
    }
    // The rows have a bound of our own; without one of the images no workspace would be known to hold them.
    bool const bounded = inputs[kTOKENS].max.d[0] > 0;
    bool const fits = bounded && mayReach(inputs[kTOKENS].max, inputs[kSCORES].max, inputs[kTHRESHOLD].max);
    // Two upper bounds need not be met at once; two shapes that are known are.
    bool const leaves = mayLeavePrefix(inputs[kTOKENS].desc.dims.d[1], inputs[kSCORES].desc.dims.d[1]);
    return fits && leaves ? 0 : kFAILED;
}

size_t ThresholdCompactPlugin::getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t,
                                                DynamicPluginTensorDesc const*, int32_t) const noexcept
{
    Dims const& most = inputs[kTOKENS].max;
    return asvitThresholdCompactWorkspace(boundOf(most.d[0], kMAX_IMAGES), boundOf(most.d[1], kASVIT_MAX_ROWS));
}

int32_t ThresholdCompactPlugin::onShapeChange(PluginTensorDesc const* inputs, int32_t nbInputs, PluginTensorDesc const*,
                                              int32_t nbOutputs) noexcept
{
    bool const fits = nbInputs == kINPUTS && nbOutputs == kOUTPUTS &&
                      mayBe(inputs[kTOKENS].dims, inputs[kSCORES].dims, inputs[kTHRESHOLD].dims);
    return fits ? 0 : kFAILED;
}

int32_t ThresholdCompactPlugin::enqueue(PluginTensorDesc const* inputDesc, PluginTensorDesc const* outputDesc,
                                        void const* const* inputs, void* const* outputs, void* workspace,
                                        cudaStream_t stream) noexcept
{
    PluginTensorDesc const& tokens = inputDesc[kTOKENS];
    if (!are(tokens.dims, inputDesc[kSCORES].dims, inputDesc[kTHRESHOLD].dims))
    {
        return kFAILED;
    }
    AsvitThresholdCompact call{};
    call.images = tokens.dims.d[0];
    call.rows = tokens.dims.d[1];
    call.width = tokens.dims.d[2];
    call.elementBytes = tokens.type == DataType::kFLOAT ? 4 : 2;
    // An engine keeps the type it was built with, which another version's headers than ours may have chosen.
    call.sizeBytes = outputDesc[kSIZE].type == DataType::kINT64 ? 8 : 4;
    call.tokens = inputs[kTOKENS];
    call.scores = static_cast<float const*>(inputs[kSCORES]);
    call.threshold = static_cast<float const*>(inputs[kTHRESHOLD]);
    call.compact = outputs[kCOMPACT];
    call.index = static_cast<int64_t*>(outputs[kINDEX]);
    call.length = static_cast<int64_t*>(outputs[kLENGTH]);
    call.size = outputs[kSIZE];
    call.workspace = workspace;
    call.prefix = call.rows - inputDesc[kSCORES].dims.d[1];
    return asvitThresholdCompact(&call, stream);
}

IPluginV3* ThresholdCompactPlugin::attachToContext(IPluginResourceContext*) noexcept { return clone(); }

PluginFieldCollection const* ThresholdCompactPlugin::getFieldsToSerialize() noexcept { return &mNoFields; }

IPluginV3* ThresholdCompactCreator::createPlugin(AsciiChar const*, PluginFieldCollection const*, TensorRTPhase) noexcept
{
    return new (std::nothrow) ThresholdCompactPlugin();
}

PluginFieldCollection const* ThresholdCompactCreator::getFieldNames() noexcept { return &mNoFields; }

AsciiChar const* ThresholdCompactCreator::getPluginName() const noexcept { return kNAME; }

AsciiChar const* ThresholdCompactCreator::getPluginVersion() const noexcept { return kVERSION; }

AsciiChar const* ThresholdCompactCreator::getPluginNamespace() const noexcept { return kNAMESPACE; }

} // namespace asvit
