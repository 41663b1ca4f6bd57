// Drives a library of the TensorRT plugin without TensorRT: getCreators -> createPlugin -> enqueue on host buffers.
//
//   driver LIBRARY contract         checks names, types, shapes and copies; says what is wrong
//   driver LIBRARY run < cases      runs the cases and writes what every output buffer holds to stdout
//   driver LIBRARY run32, run64     the same for an engine whose size tensor is int32 or int64
//
// Buffers have exactly the size that TensorRT would give them (the upper bound of each output) and are poisoned.
#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <string>
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
    Expression(std::string text, bool sizeTensor) : mText(std::move(text)), mValue(sizeTensor) { mImpl = &mValue; }

    std::string mText;

private:
    struct Value : apiv::VDimensionExpr
    {
        explicit Value(bool sizeTensor) : mSizeTensor(sizeTensor) {}
        bool isConstant() const override { return false; }
        int64_t getConstantValue() const override { return INT64_MIN; }
        bool isSizeTensor() const override { return mSizeTensor; }
        bool mSizeTensor;
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

private:
    struct Maker : apiv::VExprBuilder
    {
        explicit Maker(Builder& owner) : mOwner(owner) {}

        IDimensionExpr const* constant(int64_t value) override { return mOwner.make(std::to_string(value)); }

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
                                                             int64_t rows, int64_t width)
{
    std::array<DataType, kIN> const inputs{payload, DataType::kFLOAT, DataType::kFLOAT};
    std::array<DataType, kOUT> outputs{};
    require(build.getOutputDataTypes(outputs.data(), kOUT, inputs.data(), kIN) == 0, "getOutputDataTypes fails");
    std::array<DynamicPluginTensorDesc, kIN + kOUT> all{};
    std::array<Dims, kIN + kOUT> const shapes{
        Dims{3, {images, rows, width}}, Dims{2, {images, rows - 1}}, Dims{0, {}}, Dims{3, {images, -1, width}},
        Dims{2, {images, -1}},          Dims{1, {images}},           Dims{0, {}}};
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
    auto const configured = [&](int64_t rows)
    {
        auto const all = descriptions(*built.mBuild, DataType::kHALF, 1, rows, 64);
        return built.mBuild->configurePlugin(all.data(), kIN, all.data() + kIN, kOUT);
    };
    require(configured(4096) == 0, "4096 rows are refused");
    require(configured(4097) != 0, "4097 rows are taken");
}

// A buffer that begins `offset` bytes after an aligned place and ends where its memory ends.
class Buffer
{
public:
    Buffer(size_t bytes, size_t offset) : mBytes(bytes), mOffset(offset), mMemory(bytes + offset, kPOISON) {}

    unsigned char* data() { return mMemory.data() + mOffset; }

    void read() { require(std::fread(data(), 1, mBytes, stdin) == mBytes, "a case is cut short"); }

    void write() { require(std::fwrite(data(), 1, mBytes, stdout) == mBytes, "the result cannot be written"); }

private:
    size_t mBytes;
    size_t mOffset;
    std::vector<unsigned char> mMemory;
};

// A case is images, rows, width, type (0 float, 1 half, 2 bfloat16) and offset as int64, then the inputs. Its result is
// the status and the bytes of `size` as int64, then the four output buffers.
void runCases(IPluginCreatorV3One& creator, std::string const& what)
{
    constexpr std::array kPAYLOADS{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
    Plugin const plugin(creator.createPlugin("node", nullptr, TensorRTPhase::kRUNTIME));
    std::array<int64_t, 5> head{};
    while (std::fread(head.data(), sizeof head, 1, stdin) == 1)
    {
        auto const [images, rows, width, type, offset] = head;
        auto const all = descriptions(*plugin.mBuild, kPAYLOADS[type], images, rows, width);
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
        std::array<Buffer, kIN> in{Buffer(payload, offset), Buffer((places - images) * 4, 0), Buffer(4, 0)};
        std::array<Buffer, kOUT> out{Buffer(payload, offset), Buffer(places * 8, 0), Buffer(images * 8, 0),
                                     Buffer(sizeBytes, 0)};
        Buffer workspace(plugin.mBuild->getWorkspaceSize(all.data(), kIN, all.data() + kIN, kOUT), 0);
        for (Buffer& buffer : in)
        {
            buffer.read();
        }
        std::array<void const*, kIN> const inputs{in[0].data(), in[1].data(), in[2].data()};
        std::array<void*, kOUT> const outputs{out[0].data(), out[1].data(), out[2].data(), out[3].data()};
        require(plugin.mRuntime->onShapeChange(now.data(), kIN, now.data() + kIN, kOUT) == 0, "onShapeChange fails");
        std::array<int64_t, 2> const answer{plugin.mRuntime->enqueue(now.data(), now.data() + kIN, inputs.data(),
                                                                     outputs.data(), workspace.data(), nullptr),
                                            sizeBytes};
        require(std::fwrite(answer.data(), sizeof answer, 1, stdout) == 1, "the result cannot be written");
        for (Buffer& buffer : out)
        {
            buffer.write();
        }
    }
}

} // namespace

int main(int count, char** arguments)
{
    require(count == 3, "give a library, and contract or run");
    IPluginCreatorV3One* const creator = creatorOf(arguments[1]);
    std::string const what = arguments[2];
    require(what == "contract" || what == "run" || what == "run32" || what == "run64",
            "what to do is contract, run, run32 or run64");
    what == "contract" ? checkContract(*creator) : runCases(*creator, what);
}
