// Drives a library of the TensorRT plugin without TensorRT: getCreators -> createPlugin -> enqueue on host buffers.
//
//   driver LIBRARY contract         checks names, types, shapes and copies; says what is wrong
//   driver LIBRARY run < cases      runs the cases and writes what every output buffer holds to stdout
//   driver LIBRARY run32, run64     the same for an engine whose size tensor is int32 or int64
//   driver LIBRARY chain32, chain64 < cases
//                                   runs three calls in a row, of which each has the shape that `size` said, in two
//                                   execution contexts at once whose calls take turns
//
// Buffers have exactly the size that TensorRT would give them (the upper bound of each output) and are poisoned.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

using namespace nvinfer1;

namespace
{

constexpr int kIN = 3;
constexpr int kOUT = 4;
constexpr unsigned char kPOISON = 0xA5;

void require(bool condition, char const* what)
{
    if (!condition)
    {
        std::fprintf(stderr, "driver: %s\n", what);
        std::exit(1);
    }
}

// Dimension expressions as text.
class Expression : public IDimensionExpr
{
public:
    Expression(std::string text, bool sizeTensor, int64_t constant = INT64_MIN)
        : mText(std::move(text)), mValue(sizeTensor, constant)
    {
        mImpl = &mValue;
    }

    std::string mText;

private:
    struct Value : apiv::VDimensionExpr
    {
        Value(bool sizeTensor, int64_t constant) : mSizeTensor(sizeTensor), mConstant(constant) {}
        bool isConstant() const override { return mConstant != INT64_MIN; }
        int64_t getConstantValue() const override { return mConstant; }
        bool isSizeTensor() const override { return mSizeTensor; }
        bool mSizeTensor;
        int64_t mConstant; // INT64_MIN where it is none
    };
    Value mValue;
};

std::string textOf(IDimensionExpr const* expression) { return static_cast<Expression const*>(expression)->mText; }

class Builder : public IExprBuilder
{
public:
    Builder() : mMaker(*this) { mImpl = &mMaker; }

    IDimensionExpr const* make(std::string text, bool sizeTensor = false)
    {
        mMade.emplace_back(std::move(text), sizeTensor);
        return &mMade.back();
    }

    IDimensionExpr const* number(int64_t value)
    {
        mMade.emplace_back(std::to_string(value), false, value);
        return &mMade.back();
    }

private:
    struct Maker : apiv::VExprBuilder
    {
        explicit Maker(Builder& owner) : mOwner(owner) {}

        IDimensionExpr const* constant(int64_t value) override { return mOwner.number(value); }

        IDimensionExpr const* operation(DimensionOperation op, IDimensionExpr const& a,
                                        IDimensionExpr const& b) override
        {
            require(!a.isSizeTensor() && !b.isSizeTensor(), "arithmetic on a size tensor");
            return mOwner.make(std::to_string(static_cast<int>(op)) + "(" + textOf(&a) + "," + textOf(&b) + ")");
        }

        IDimensionExpr const* declareSizeTensor(int32_t output, IDimensionExpr const& opt,
                                                IDimensionExpr const& upper) override
        {
            require(!opt.isSizeTensor(), "the optimum depends on a size tensor");
            std::string const text = "size" + std::to_string(output) + "[" + textOf(&opt) + "," + textOf(&upper) + "]";
            return mOwner.make(text, true);
        }

        Builder& mOwner;
    };

    Maker mMaker;
    std::deque<Expression> mMade;
};

struct Plugin
{
    std::unique_ptr<IPluginV3> mOwner;
    IPluginV3OneCore* mCore;
    IPluginV3OneBuild* mBuild;
    IPluginV3OneRuntime* mRuntime;

    explicit Plugin(IPluginV3* plugin) : mOwner(plugin)
    {
        require(plugin != nullptr, "no plugin was created");
        mCore = static_cast<IPluginV3OneCore*>(plugin->getCapabilityInterface(PluginCapabilityType::kCORE));
        mBuild = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        mRuntime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        require(mCore != nullptr && mBuild != nullptr && mRuntime != nullptr, "a capability is missing");
    }
};

IPluginCreatorV3One* creatorOf(char const* path)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    require(library != nullptr, dlerror());
    auto const getCreators =
        reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    auto const setLoggerFinder = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"));
    require(getCreators != nullptr && setLoggerFinder != nullptr, "an entry point is missing");
    setLoggerFinder(nullptr);
    int32_t count = 0;
    IPluginCreatorInterface* const* const creators = getCreators(count);
    require(count == 1 && creators != nullptr, "not one creator");
    std::string const kind = creators[0]->getInterfaceInfo().kind;
    require(kind == "PLUGIN CREATOR_V3ONE", "not a creator of V3 plugins");
    return static_cast<IPluginCreatorV3One*>(creators[0]);
}

std::array<DynamicPluginTensorDesc, kIN + kOUT> descriptions(IPluginV3OneBuild& build, DataType payload, int64_t images,
                                                             int64_t rows, int64_t width, int64_t prefix = 1)
{
    std::array<DataType, kIN> const inputs{payload, DataType::kFLOAT, DataType::kFLOAT};
    std::array<DataType, kOUT> outputs{};
    require(build.getOutputDataTypes(outputs.data(), kOUT, inputs.data(), kIN) == 0, "getOutputDataTypes fails");
    std::array<DynamicPluginTensorDesc, kIN + kOUT> all{};
    // Rows that are not known leave the scores unknown too.
    std::array<Dims, kIN + kOUT> const shapes{Dims{3, {images, rows, width}},
                                              Dims{2, {images, rows < 0 ? -1 : rows - prefix}},
                                              Dims{0, {}},
                                              Dims{3, {images, -1, width}},
                                              Dims{2, {images, -1}},
                                              Dims{1, {images}},
                                              Dims{0, {}}};
    for (int i = 0; i < kIN + kOUT; ++i)
    {
        all[i].desc.type = i < kIN ? inputs[i] : outputs[i - kIN];
        all[i].desc.format = TensorFormat::kLINEAR;
        all[i].desc.dims = shapes[i];
        all[i].min = all[i].opt = all[i].max = shapes[i];
    }
    return all;
}

void checkShapes(IPluginV3OneBuild& build, bool chained, char const* wantedSize)
{
    Builder builder;
    std::array<DimsExprs, kIN> inputs{};
    inputs[0].nbDims = 3;
    inputs[0].d[0] = builder.make("B");
    inputs[0].d[1] = builder.make("M", chained);
    inputs[0].d[2] = builder.make("D");
    inputs[1].nbDims = 2;
    inputs[1].d[0] = inputs[0].d[0];
    inputs[1].d[1] = builder.make("N");
    std::array<DimsExprs, kOUT> outputs{};
    require(build.getOutputShapes(inputs.data(), kIN, nullptr, 0, outputs.data(), kOUT, builder) == 0,
            "getOutputShapes fails");
    require(outputs[0].nbDims == 3 && textOf(outputs[0].d[0]) == "B" && textOf(outputs[0].d[1]) == wantedSize &&
                textOf(outputs[0].d[2]) == "D",
            "compact is not [B, size, D]");
    require(outputs[1].nbDims == 2 && textOf(outputs[1].d[0]) == "B" && outputs[1].d[1] == outputs[0].d[1],
            "index is not [B, size]");
    require(outputs[2].nbDims == 1 && textOf(outputs[2].d[0]) == "B", "length is not [B]");
    require(outputs[3].nbDims == 0, "size is not a scalar");
    inputs[0].nbDims = 2;
    require(build.getOutputShapes(inputs.data(), kIN, nullptr, 0, outputs.data(), kOUT, builder) != 0,
            "tokens of two dimensions are taken");
    inputs[0].nbDims = 3;
    require(build.getOutputShapes(inputs.data(), kIN - 1, nullptr, 0, outputs.data(), kOUT, builder) != 0,
            "two inputs are taken");
    auto const takes = [&](int64_t rows, int64_t scores)
    {
        inputs[0].d[1] = rows < 0 ? builder.make("M", chained) : builder.number(rows);
        inputs[1].d[1] = scores < 0 ? builder.make("N") : builder.number(scores);
        return build.getOutputShapes(inputs.data(), kIN, nullptr, 0, outputs.data(), kOUT, builder) == 0;
    };
    require(takes(197, 196) && takes(198, 196) && takes(201, 196) && takes(6, 1), "a prefix is refused");
    require(takes(-1, 196) && takes(197, -1), "a dimension that is known alone is refused");
    require(!takes(197, 197) && !takes(197, 198), "scores that leave no prefix are taken");
    require(!takes(197, 0) && !takes(-1, 0), "no image token is taken");
}

void checkTypes(IPluginV3OneBuild& build)
{
    constexpr std::array kTYPES{DataType::kFLOAT, DataType::kHALF, DataType::kBF16, DataType::kINT32,
                                DataType::kINT64, DataType::kINT8, DataType::kBOOL};
    for (DataType const payload : {DataType::kFLOAT, DataType::kHALF, DataType::kBF16})
    {
        auto all = descriptions(build, payload, 2, 9, 64);
        for (int i = 0; i < kIN + kOUT; ++i)
        {
            auto const fits = [&] { return build.supportsFormatCombination(i, all.data(), kIN, kOUT); };
            require(fits(), "a type of the contract is refused");
            DataType const right = all[i].desc.type;
            for (DataType const other : kTYPES)
            {
                bool const payloads = other == DataType::kFLOAT || other == DataType::kHALF || other == DataType::kBF16;
                all[i].desc.type = other;
                require(fits() == (other == right || (i == 0 && payloads)), "a type beyond the contract is taken");
            }
            all[i].desc.type = right;
            all[i].desc.format = TensorFormat::kCHW32;
            require(!fits(), "a format that is not linear is taken");
            all[i].desc.format = TensorFormat::kLINEAR;
        }
        require(all[kIN + 1].desc.type == DataType::kINT64 && all[kIN + 2].desc.type == DataType::kINT64,
                "index and length are not int64");
        bool const is64 = NV_TENSORRT_MAJOR > 10 || (NV_TENSORRT_MAJOR == 10 && NV_TENSORRT_MINOR >= 15);
        require(all[kIN + 3].desc.type == (is64 ? DataType::kINT64 : DataType::kINT32), "size has the wrong type");
    }
}

// What the builder asks about shapes that are known, and about upper bounds that need not fit each other.
void checkPrefixes(IPluginV3OneBuild& build)
{
    auto const ask = [&](int64_t rows, int64_t prefix, bool known)
    {
        auto all = descriptions(build, DataType::kHALF, 2, rows, 64, prefix);
        if (!known)
        {
            all[0].desc.dims.d[1] = all[1].desc.dims.d[1] = -1;
        }
        return build.configurePlugin(all.data(), kIN, all.data() + kIN, kOUT) == 0;
    };
    for (bool const known : {true, false})
    {
        require(ask(197, 1, known) && ask(198, 2, known) && ask(261, 5, known) && ask(6, 5, known),
                "a prefix of the contract is refused");
        require(!ask(9, 9, known) && !ask(2, 2, known), "no image token is taken");
    }
    require(!ask(9, 0, true) && !ask(9, -1, true), "scores that leave no prefix are taken");
    require(ask(9, 0, false), "upper bounds that are not met at once are refused");
}

// What the builder asks, with upper bounds of which some may not be known.
void checkBounds(IPluginV3OneBuild& build)
{
    auto const ask = [&](int64_t images, int64_t rows)
    {
        auto const all = descriptions(build, DataType::kHALF, images, rows, 64);
        return std::pair{build.configurePlugin(all.data(), kIN, all.data() + kIN, kOUT),
                         build.getWorkspaceSize(all.data(), kIN, all.data() + kIN, kOUT)};
    };
    require(ask(1, 4096) == std::pair(0, size_t{2 * 4096}), "4096 rows are refused");
    require(ask(8, 197) == std::pair(0, size_t{2 * 8 * 197}), "the workspace is not two bytes a row");
    require(ask(8, -1) == std::pair(0, size_t{2 * 8 * 4096}), "rows without a bound do not get all that there may be");
    require(ask(INT32_MAX, -1) == std::pair(0, size_t{2} * INT32_MAX * 4096), "the workspace overflows");
    for (auto const& [images, rows] : {std::pair<int64_t, int64_t>{1, 4097}, {1, INT64_MAX}, {-1, 197}, {-1, -1},
                                       {0, 197}, {1, 1}, {1, 0}, {int64_t{INT32_MAX} + 1, 197}, {INT64_MAX, 4096}})
    {
        auto const [status, bytes] = ask(images, rows);
        require(status != 0, "bounds that no workspace can hold are taken");
        require(bytes <= size_t{2} * INT32_MAX * 4096, "the workspace overflows");
    }
    auto all = descriptions(build, DataType::kHALF, 2, 9, 64);
    require(build.configurePlugin(all.data(), kIN - 1, all.data() + kIN, kOUT) != 0, "two inputs are taken");
    require(build.configurePlugin(all.data(), kIN, all.data() + kIN, kOUT - 1) != 0, "three outputs are taken");
    // Before the shapes are known TensorRT says -1 in the description itself; only the bounds count.
    all[0].desc.dims = Dims{3, {-1, -1, 64}};
    all[1].desc.dims = Dims{2, {-1, -1}};
    require(build.configurePlugin(all.data(), kIN, all.data() + kIN, kOUT) == 0, "unknown shapes are refused");
    all[0].max.nbDims = 2;
    require(build.configurePlugin(all.data(), kIN, all.data() + kIN, kOUT) != 0, "tokens of two dimensions are taken");
    checkPrefixes(build);
}

// What the runtime says when shapes change, which may be before a layer in front has computed its own.
void checkShapeChanges(IPluginV3OneRuntime& runtime, IPluginV3OneBuild& build)
{
    auto const ask = [&](Dims const& tokens, Dims const& scores, int32_t inputs = kIN)
    {
        auto const all = descriptions(build, DataType::kFLOAT, 1, 9, 64);
        std::array<PluginTensorDesc, kIN + kOUT> now{};
        std::transform(all.begin(), all.end(), now.begin(), [](auto const& one) { return one.desc; });
        now[0].dims = tokens;
        now[1].dims = scores;
        return runtime.onShapeChange(now.data(), inputs, now.data() + kIN, kOUT);
    };
    require(ask({3, {1, 2, 64}}, {2, {1, 1}}) == 0, "the smallest shape is refused");
    require(ask({3, {8, 4096, 64}}, {2, {8, 4095}}) == 0, "4096 rows are refused");
    require(ask({3, {8, -1, 64}}, {2, {8, -1}}) == 0, "rows that are not known yet are refused");
    require(ask({3, {1, 4097, 64}}, {2, {1, 4096}}) != 0, "4097 rows are taken");
    require(ask({3, {1, 1, 64}}, {2, {1, 0}}) != 0, "a row alone is taken");
    require(ask({3, {8, 201, 64}}, {2, {8, 196}}) == 0, "a prefix of five rows is refused");
    require(ask({3, {8, 201, 64}}, {2, {8, -1}}) == 0, "scores that are not known yet are refused");
    require(ask({3, {8, -1, 64}}, {2, {8, 196}}) == 0, "scores that are known first are refused");
    require(ask({3, {8, 201, 64}}, {2, {8, 0}}) != 0, "no image token is taken");
    require(ask({3, {8, 201, 64}}, {2, {8, 201}}) != 0, "scores that leave no prefix are taken");
    require(ask({3, {8, 201, 64}}, {2, {8, 300}}) != 0, "more scores than rows are taken");
    require(ask({2, {9, 64}}, {2, {1, 8}}) != 0, "tokens of two dimensions are taken");
    require(ask({3, {1, 9, 64}}, {2, {1, 8}}, kIN - 1) != 0, "two inputs are taken");
}

void checkContract(IPluginCreatorV3One& creator)
{
    require(creator.getPluginName() == std::string("ThresholdCompact"), "the creator's name");
    require(creator.getPluginVersion() == std::string("1"), "the creator's version");
    require(creator.getPluginNamespace() == std::string(), "the creator's namespace");
    require(creator.getFieldNames() != nullptr && creator.getFieldNames()->nbFields == 0, "the creator's fields");

    PluginFieldCollection const none{};
    Plugin const built(creator.createPlugin("node", &none, TensorRTPhase::kBUILD));
    Plugin const again(creator.createPlugin("node", built.mRuntime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME));
    Plugin const cloned(built.mOwner->clone());
    Plugin const attached(again.mRuntime->attachToContext(nullptr));
    for (Plugin const* plugin : {&built, &again, &cloned, &attached})
    {
        require(plugin->mCore->getPluginName() == std::string("ThresholdCompact"), "the plugin's name");
        require(plugin->mCore->getPluginVersion() == std::string("1"), "the plugin's version");
        require(plugin->mCore->getPluginNamespace() == std::string(), "the plugin's namespace");
        require(plugin->mBuild->getNbOutputs() == kOUT, "not four outputs");
        checkShapes(*plugin->mBuild, false, "size3[8(1(M,7),10),M]");
        checkShapes(*plugin->mBuild, true, "size3[98,M]");
        checkTypes(*plugin->mBuild);
    }
    checkBounds(*built.mBuild);
    checkShapeChanges(*built.mRuntime, *built.mBuild);
}

// A buffer that begins `offset` bytes after an aligned place and ends where its memory ends.
class Buffer
{
public:
    Buffer(size_t bytes, size_t offset) : mBytes(bytes), mOffset(offset), mMemory(bytes + offset, kPOISON) {}

    unsigned char* data() { return mMemory.data() + mOffset; }

    void read() { require(std::fread(data(), 1, mBytes, stdin) == mBytes, "a case is cut short"); }

    void write() { require(std::fwrite(data(), 1, mBytes, stdout) == mBytes, "the result cannot be written"); }

    void poison() { std::fill(mMemory.begin(), mMemory.end(), kPOISON); }

    size_t bytes() const { return mBytes; }

private:
    size_t mBytes;
    size_t mOffset;
    std::vector<unsigned char> mMemory;
};

// A case is images, rows, prefix, width, type (0 float, 1 half, 2 bfloat16) and offset as int64, then the inputs. Its
// result is the status and the bytes of `size` as int64, then the four output buffers.
void runCases(IPluginCreatorV3One& creator, std::string const& what)
{
    constexpr std::array kPAYLOADS{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
    Plugin const plugin(creator.createPlugin("node", nullptr, TensorRTPhase::kRUNTIME));
    std::array<int64_t, 6> head{};
    while (std::fread(head.data(), sizeof head, 1, stdin) == 1)
    {
        auto const [images, rows, prefix, width, type, offset] = head;
        auto const all = descriptions(*plugin.mBuild, kPAYLOADS[type], images, rows, width, prefix);
        std::array<PluginTensorDesc, kIN + kOUT> now{};
        for (int i = 0; i < kIN + kOUT; ++i)
        {
            now[i] = all[i].desc;
        }
        if (what != "run")
        {
            now[kIN + 3].type = what == "run64" ? DataType::kINT64 : DataType::kINT32;
        }
        int64_t const sizeBytes = now[kIN + 3].type == DataType::kINT64 ? 8 : 4;
        size_t const places = images * rows;
        size_t const payload = places * width * (type == 0 ? 4 : 2);
        std::array<Buffer, kIN> in{Buffer(payload, offset), Buffer((places - images * prefix) * 4, 0), Buffer(4, 0)};
        std::array<Buffer, kOUT> out{Buffer(payload, offset), Buffer(places * 8, 0), Buffer(images * 8, 0),
                                     Buffer(sizeBytes, 0)};
        Buffer workspace(plugin.mBuild->getWorkspaceSize(all.data(), kIN, all.data() + kIN, kOUT), 0);
        for (Buffer& buffer : in)
        {
            buffer.read();
        }
        std::array<void const*, kIN> const inputs{in[0].data(), in[1].data(), in[2].data()};
        std::array<void*, kOUT> const outputs{out[0].data(), out[1].data(), out[2].data(), out[3].data()};
        int32_t const changed = plugin.mRuntime->onShapeChange(now.data(), kIN, now.data() + kIN, kOUT);
        std::array<int64_t, 2> const answer{plugin.mRuntime->enqueue(now.data(), now.data() + kIN, inputs.data(),
                                                                     outputs.data(), workspace.data(), nullptr),
                                            sizeBytes};
        require((changed == 0) == (answer[0] == 0), "onShapeChange and enqueue disagree");
        require(std::fwrite(answer.data(), sizeof answer, 1, stdout) == 1, "the result cannot be written");
        for (Buffer& buffer : out)
        {
            buffer.write();
        }
    }
}

constexpr int kSTAGES = 3;

// The shapes and type of a chain's inputs, as its record begins.
struct Head
{
    int64_t images, rows, prefix, width, type;

    size_t rowBytes() const { return width * (type == 0 ? 4 : 2); }
};

// One execution context of an engine of three plugin layers: clones of the engine's plugins, buffers and a stream of
// its own, and one workspace that the layers take in turn.
class Context
{
public:
    Context(std::vector<Plugin> const& layers, Head const& head, DataType sizeType, cudaStream_t stream)
        : mHead(head), mSizeType(sizeType), mStream(stream), mRows(head.rows),
          mTokens(head.images * head.rows * head.rowBytes(), 0)
    {
        size_t const places = head.images * head.rows;
        for (Plugin const& layer : layers)
        {
            mLayers.emplace_back(layer.mRuntime->attachToContext(nullptr));
            mScores.emplace_back((places - head.images * head.prefix) * 4, 0);
            mThresholds.emplace_back(4, 0);
            mOutputs.push_back({Buffer(mTokens.bytes(), 0), Buffer(places * 8, 0), Buffer(head.images * 8, 0),
                                Buffer(sizeBytes(), 0)});
        }
        mWorkspace.emplace_back(2 * places, 0);
    }

    void read()
    {
        mTokens.read();
        for (int stage = 0; stage < kSTAGES; ++stage)
        {
            mScores[stage].read();
            mThresholds[stage].read();
        }
    }

    void run(int stage)
    {
        auto& [compact, index, length, size] = mOutputs[stage];
        auto const all = now();
        std::array<void const*, kIN> const inputs{stage == 0 ? mTokens.data() : mOutputs[stage - 1][0].data(),
                                                  scoresOf(stage), mThresholds[stage].data()};
        std::array<void*, kOUT> const outputs{compact.data(), index.data(), length.data(), size.data()};
        mWorkspace[0].poison();
        IPluginV3OneRuntime& runtime = *mLayers[stage].mRuntime;
        require(runtime.onShapeChange(all.data(), kIN, all.data() + kIN, kOUT) == 0, "onShapeChange fails");
        require(runtime.enqueue(all.data(), all.data() + kIN, inputs.data(), outputs.data(), mWorkspace[0].data(),
                                mStream) == 0,
                "enqueue fails");
        int64_t wide = 0;
        int32_t narrow = 0;
        std::memcpy(sizeBytes() == 8 ? static_cast<void*>(&wide) : &narrow, size.data(), sizeBytes());
        mRows = sizeBytes() == 8 ? wide : narrow;
        require(mRows > mHead.prefix && mRows <= mHead.rows, "size is none that a next call can have");
    }

    void write()
    {
        for (auto& stage : mOutputs)
        {
            for (Buffer& buffer : stage)
            {
                buffer.write();
            }
        }
    }

private:
    size_t sizeBytes() const { return mSizeType == DataType::kINT64 ? 8 : 4; }

    std::array<PluginTensorDesc, kIN + kOUT> now() const
    {
        constexpr std::array kPAYLOADS{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
        auto const all =
            descriptions(*mLayers[0].mBuild, kPAYLOADS[mHead.type], mHead.images, mRows, mHead.width, mHead.prefix);
        std::array<PluginTensorDesc, kIN + kOUT> descs{};
        std::transform(all.begin(), all.end(), descs.begin(), [](auto const& one) { return one.desc; });
        descs[kIN + 3].type = mSizeType;
        return descs;
    }

    // The first scores of the record, -inf for rows that pad the batch, as dense as this call's shape has them.
    void const* scoresOf(int stage)
    {
        auto* const scores = reinterpret_cast<float*>(mScores[stage].data());
        for (int64_t b = 0; b < mHead.images; ++b)
        {
            auto const* index = stage == 0 ? nullptr : reinterpret_cast<int64_t*>(mOutputs[stage - 1][1].data());
            int64_t const prefix = mHead.prefix;
            for (int64_t i = 0; i + prefix < mRows; ++i)
            {
                bool const pads = index != nullptr && index[b * mRows + i + prefix] < 0;
                scores[b * (mRows - prefix) + i] = pads ? -INFINITY : scores[b * (mHead.rows - prefix) + i];
            }
        }
        return scores;
    }

    Head mHead;
    DataType mSizeType;
    cudaStream_t mStream;
    int64_t mRows; // of the call that is next
    Buffer mTokens;
    std::vector<Plugin> mLayers;
    std::vector<Buffer> mScores, mThresholds, mWorkspace;
    std::vector<std::array<Buffer, kOUT>> mOutputs;
};

// A record is images, rows, prefix, width and type as int64, then for each of two contexts its tokens, and for each
// stage scores [B, M-P] and a threshold. The result is the four output buffers of every stage of every context.
void runChains(IPluginCreatorV3One& creator, DataType sizeType)
{
    std::vector<Plugin> layers;
    for (int stage = 0; stage < kSTAGES; ++stage)
    {
        layers.emplace_back(creator.createPlugin("node", nullptr, TensorRTPhase::kRUNTIME));
    }
    Head head{};
    while (std::fread(&head, sizeof head, 1, stdin) == 1)
    {
        std::array<Context, 2> contexts{Context(layers, head, sizeType, reinterpret_cast<cudaStream_t>(8)),
                                        Context(layers, head, sizeType, reinterpret_cast<cudaStream_t>(16))};
        for (Context& context : contexts)
        {
            context.read();
        }
        for (int stage = 0; stage < kSTAGES; ++stage)
        {
            for (Context& context : contexts)
            {
                context.run(stage);
            }
        }
        for (Context& context : contexts)
        {
            context.write();
        }
    }
}

} // namespace

int main(int count, char** arguments)
{
    require(count == 3, "give a library, and contract, run or chain");
    IPluginCreatorV3One* const creator = creatorOf(arguments[1]);
    std::string const what = arguments[2];
    if (what == "chain32" || what == "chain64")
    {
        runChains(*creator, what == "chain64" ? DataType::kINT64 : DataType::kINT32);
        return 0;
    }
    require(what == "contract" || what == "run" || what == "run32" || what == "run64",
            "what to do is contract, run, run32, run64, chain32 or chain64");
    what == "contract" ? checkContract(*creator) : runCases(*creator, what);
}
