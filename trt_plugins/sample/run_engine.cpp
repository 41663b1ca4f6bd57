// Runs one picture through an engine of ours: plugin, plan, buffers, one enqueue; prints the best five classes, or
// of an embedding its width, its norm and its first numbers, and how many tokens each stage kept.
//
//   run_engine PLAN PICTURE.ppm [PLUGIN.so]
//
// Preprocessing and prefix come from PLAN.json, the sidecar that `build-engine` writes.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include "../../plugins/sample/answer.h"
#include "../../plugins/sample/picture.h"

using namespace nvinfer1;

namespace
{

// Keeps the first error, which is the cause; those behind it are its consequences.
class Logger : public ILogger
{
public:
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        if (severity <= Severity::kERROR && mError.empty())
        {
            mError = message;
            std::replace(mError.begin(), mError.end(), '\n', ' ');
        }
    }

    std::string mError;
};

Logger gLogger;

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        sample::fail(what + (gLogger.mError.empty() ? "" : " (TensorRT: " + gLogger.mError + ")"));
    }
}

void cuda(cudaError_t error, char const* what)
{
    if (error != cudaSuccess)
    {
        sample::fail(std::string(what) + " (CUDA: " + cudaGetErrorString(error) + ")");
    }
}

class Stream
{
public:
    Stream() { cuda(cudaStreamCreateWithFlags(&mStream, cudaStreamNonBlocking), "no GPU can be used"); }
    ~Stream() { cudaStreamDestroy(mStream); }
    Stream(Stream const&) = delete;
    Stream& operator=(Stream const&) = delete;

    operator cudaStream_t() const { return mStream; }

private:
    cudaStream_t mStream{};
};

class DeviceBuffer
{
public:
    explicit DeviceBuffer(size_t bytes) : mBytes(bytes)
    {
        cuda(cudaMalloc(&mData, std::max<size_t>(bytes, 1)), "no device memory");
    }
    ~DeviceBuffer() { cudaFree(mData); }
    DeviceBuffer(DeviceBuffer const&) = delete;
    DeviceBuffer& operator=(DeviceBuffer const&) = delete;

    void* data() const { return mData; }

    std::vector<char> read(cudaStream_t stream) const
    {
        std::vector<char> host(mBytes);
        cuda(cudaMemcpyAsync(host.data(), mData, mBytes, cudaMemcpyDeviceToHost, stream), "an output cannot be read");
        cuda(cudaStreamSynchronize(stream), "the engine fails");
        return host;
    }

private:
    size_t mBytes;
    void* mData{};
};

// Names of the network: `images` goes in, `logits` or `embedding`, and `length_0` and so on, come out.
using Outputs = std::map<std::string, std::unique_ptr<DeviceBuffer>>;

std::unique_ptr<ICudaEngine> load(IRuntime& runtime, char const* plan, char const* plugin)
{
    if (plugin != nullptr)
    {
        require(runtime.getPluginRegistry().loadLibrary(plugin) != nullptr, std::string(plugin) + " cannot be loaded");
    }
    std::string const bytes = sample::contentOf(plan);
    std::unique_ptr<ICudaEngine> engine(runtime.deserializeCudaEngine(bytes.data(), bytes.size()));
    require(engine != nullptr, std::string(plan) + " is no engine for this GPU and TensorRT, or lacks its plugin");
    return engine;
}

// One picture; a dynamic batch is set to 1.
std::unique_ptr<DeviceBuffer> bindPicture(ICudaEngine const& engine, IExecutionContext& context, char const* path,
                                          std::string const& sidecar, cudaStream_t stream)
{
    Dims shape = engine.getTensorShape("images");
    bool const takes = shape.nbDims == 4 && engine.getTensorDataType("images") == DataType::kFLOAT;
    require(takes, "the engine has no input images [B, 3, H, W] in float32");
    require(shape.d[1] == 3 && shape.d[2] >= 1 && shape.d[2] == shape.d[3], "the engine takes no square pictures");
    shape.d[0] = 1;
    require(context.setInputShape("images", shape), "the engine takes no batch of one");
    auto const picture = sample::preprocess(sample::readPpm(path), sample::readRules(sidecar), shape.d[2]);
    size_t const bytes = picture.size() * sizeof(float);
    auto buffer = std::make_unique<DeviceBuffer>(bytes);
    cuda(cudaMemcpyAsync(buffer->data(), picture.data(), bytes, cudaMemcpyHostToDevice, stream),
         "the picture cannot be copied");
    cuda(cudaStreamSynchronize(stream), "the picture cannot be copied");
    require(context.setTensorAddress("images", buffer->data()), "images cannot be bound");
    return buffer;
}

// A size that only the run reveals gets the room of its upper bound.
Outputs bindOutputs(ICudaEngine const& engine, IExecutionContext& context)
{
    Outputs outputs;
    for (int32_t i = 0; i < engine.getNbIOTensors(); ++i)
    {
        char const* const name = engine.getIOTensorName(i);
        if (engine.getTensorIOMode(name) == TensorIOMode::kOUTPUT)
        {
            int64_t const bytes = context.getMaxOutputSize(name);
            require(bytes >= 0, std::string(name) + " has no bounded size");
            auto const& buffer = outputs[name] = std::make_unique<DeviceBuffer>(static_cast<size_t>(bytes));
            require(context.setTensorAddress(name, buffer->data()), std::string(name) + " cannot be bound");
        }
    }
    require(outputs.count("logits") + outputs.count("embedding") == 1, "the engine has no output logits or embedding");
    return outputs;
}

// The numbers of an output for one picture: [1, C] of a rank of two, [1] of one.
template <typename T>
std::vector<T> valuesOf(IExecutionContext const& context, std::string const& name, DeviceBuffer const& buffer,
                        int32_t rank, cudaStream_t stream)
{
    Dims const shape = context.getTensorShape(name.c_str());
    bool const fits = shape.nbDims == rank && shape.d[0] == 1 && shape.d[rank - 1] >= 1;
    require(fits, name + " has not the shape that one picture gives");
    std::vector<T> values(static_cast<size_t>(shape.d[rank - 1]));
    std::vector<char> const content = buffer.read(stream);
    require(content.size() >= values.size() * sizeof(T), name + " has fewer bytes than its shape says");
    std::memcpy(values.data(), content.data(), values.size() * sizeof(T));
    return values;
}

int64_t countOf(ICudaEngine const& engine, IExecutionContext const& context, std::string const& name,
                DeviceBuffer const& buffer, cudaStream_t stream)
{
    DataType const type = engine.getTensorDataType(name.c_str());
    require(type == DataType::kINT64 || type == DataType::kINT32, name + " is neither int64 nor int32");
    return type == DataType::kINT64 ? valuesOf<int64_t>(context, name, buffer, 1, stream)[0]
                                    : valuesOf<int32_t>(context, name, buffer, 1, stream)[0];
}

void run(char const* plan, char const* picture, char const* plugin)
{
    Stream const stream;
    std::unique_ptr<IRuntime> const runtime(createInferRuntime(gLogger));
    require(runtime != nullptr, "TensorRT cannot start");
    auto const engine = load(*runtime, plan, plugin);
    std::unique_ptr<IExecutionContext> const context(engine->createExecutionContext());
    require(context != nullptr, "the engine cannot be set up");
    std::string const sidecar = sample::contentOf(std::string(plan) + ".json");
    auto const images = bindPicture(*engine, *context, picture, sidecar, stream);
    Outputs const outputs = bindOutputs(*engine, *context);
    require(context->enqueueV3(stream), "the engine cannot be enqueued");

    bool const classes = outputs.count("logits") == 1;
    std::string const output = classes ? "logits" : "embedding";
    require(engine->getTensorDataType(output.c_str()) == DataType::kFLOAT, output + " is not float32");
    auto const values = valuesOf<float>(*context, output, *outputs.at(output), 2, stream);
    classes ? sample::printBest(values) : sample::printEmbedding(values);
    std::vector<int64_t> lengths;
    for (size_t stage = 0; outputs.count("length_" + std::to_string(stage)) == 1; ++stage)
    {
        std::string const name = "length_" + std::to_string(stage);
        lengths.push_back(countOf(*engine, *context, name, *outputs.at(name), stream));
    }
    bool const said = sidecar.find("\"prefix\":") != std::string::npos; // else it is the class token
    sample::printKept(lengths, said ? std::strtoll(sample::valueOf(sidecar, "prefix").c_str(), nullptr, 10) : 1);
}

} // namespace

int main(int count, char** arguments)
{
    return sample::runMain(count, arguments, "usage: run_engine PLAN PICTURE.ppm [PLUGIN.so]", run);
}
