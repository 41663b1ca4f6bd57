// Runs one picture through an engine of ours, in C++: plugin, plan, buffers, one enqueue; prints the best five classes, or
// of an embedding its width, its norm and its first numbers, and how many tokens each stage kept, the class token and
// whatever else is of the prefix among them.
//
//   run_engine PLAN PICTURE.f32 [PLUGIN.so]
//
// The picture is the network's input, float32 [3, H, W]; README.md says how to write it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInfer.h>
#include <cuda_runtime_api.h>

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

[[noreturn]] void fail(std::string const& what) { throw std::runtime_error(what); }

void require(bool condition, std::string const& what)
{
    if (!condition)
    {
        fail(what + (gLogger.mError.empty() ? "" : " (TensorRT: " + gLogger.mError + ")"));
    }
}

void cuda(cudaError_t error, char const* what)
{
    if (error != cudaSuccess)
    {
        fail(std::string(what) + " (CUDA: " + cudaGetErrorString(error) + ")");
    }
}

std::vector<char> contentOf(std::string const& path)
{
    std::ifstream file(path, std::ios::binary);
    std::vector<char> content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    require(file.good() || file.eof(), path + " cannot be read");
    require(!content.empty(), path + " is missing or empty");
    return content;
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
    std::vector<char> const bytes = contentOf(plan);
    std::unique_ptr<ICudaEngine> engine(runtime.deserializeCudaEngine(bytes.data(), bytes.size()));
    require(engine != nullptr, std::string(plan) + " is no engine for this GPU and TensorRT, or lacks its plugin");
    return engine;
}

// One picture; a dynamic batch is set to 1.
std::unique_ptr<DeviceBuffer> bindPicture(ICudaEngine const& engine, IExecutionContext& context, char const* path,
                                          cudaStream_t stream)
{
    Dims shape = engine.getTensorShape("images");
    require(shape.nbDims == 4, "the engine has no input images [B, 3, H, W]");
    shape.d[0] = 1;
    require(context.setInputShape("images", shape), "the engine takes no batch of one");
    std::vector<char> const picture = contentOf(path);
    auto const pixels = static_cast<size_t>(shape.d[1] * shape.d[2] * shape.d[3]);
    require(picture.size() == pixels * sizeof(float),
            std::string(path) + " holds " + std::to_string(picture.size()) + " bytes, the engine wants float32 [" +
                std::to_string(shape.d[1]) + ", " + std::to_string(shape.d[2]) + ", " + std::to_string(shape.d[3]) +
                "]");
    auto buffer = std::make_unique<DeviceBuffer>(picture.size());
    cuda(cudaMemcpyAsync(buffer->data(), picture.data(), picture.size(), cudaMemcpyHostToDevice, stream),
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

template <typename T> T at(std::vector<char> const& bytes, size_t i)
{
    T value{};
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    return value;
}

void printEmbedding(std::vector<float> const& embedding)
{
    double const squares = std::accumulate(embedding.begin(), embedding.end(), 0.0,
                                           [](double total, float x) { return total + double{x} * x; });
    std::printf("embedding of %zu numbers, norm %.6g:", embedding.size(), std::sqrt(squares));
    auto const shown = std::min<size_t>(5, embedding.size());
    for (size_t i = 0; i < shown; ++i)
    {
        std::printf(" %.6g", double{embedding[i]});
    }
    std::printf("%s\n", shown < embedding.size() ? " ..." : "");
}

void printBest(std::vector<float> const& logits)
{
    std::vector<size_t> order(logits.size());
    std::iota(order.begin(), order.end(), size_t{0});
    auto const shown = std::min<size_t>(5, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(),
                      [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    float const top = logits[order[0]];
    double const sum = std::accumulate(logits.begin(), logits.end(), 0.0,
                                       [&](double total, float x) { return total + std::exp(double{x} - top); });
    for (size_t i = 0; i < shown; ++i)
    {
        std::printf("class %zu  %.4f\n", order[i], std::exp(double{logits[order[i]]} - top) / sum);
    }
}

void run(char const* plan, char const* picture, char const* plugin)
{
    Stream const stream;
    std::unique_ptr<IRuntime> const runtime(createInferRuntime(gLogger));
    require(runtime != nullptr, "TensorRT cannot start");
    auto const engine = load(*runtime, plan, plugin);
    std::unique_ptr<IExecutionContext> const context(engine->createExecutionContext());
    require(context != nullptr, "the engine cannot be set up");
    auto const images = bindPicture(*engine, *context, picture, stream);
    Outputs const outputs = bindOutputs(*engine, *context);
    require(context->enqueueV3(stream), "the engine cannot be enqueued");

    bool const classes = outputs.count("logits") == 1;
    char const* const output = classes ? "logits" : "embedding";
    Dims const shape = engine->getTensorShape(output);
    require(engine->getTensorDataType(output) == DataType::kFLOAT, std::string(output) + " is not float32");
    std::vector<char> const content = outputs.at(output)->read(stream);
    std::vector<float> values(static_cast<size_t>(shape.d[shape.nbDims - 1]));
    std::memcpy(values.data(), content.data(), values.size() * sizeof(float));
    classes ? printBest(values) : printEmbedding(values);
    for (size_t stage = 0; outputs.count("length_" + std::to_string(stage)) == 1; ++stage)
    {
        std::string const name = "length_" + std::to_string(stage);
        auto const bytes = outputs.at(name)->read(stream);
        bool const wide = engine->getTensorDataType(name.c_str()) == DataType::kINT64;
        int64_t const length = wide ? at<int64_t>(bytes, 0) : at<int32_t>(bytes, 0);
        std::printf("stage %zu  %lld tokens stay, prefix included\n", stage, static_cast<long long>(length));
    }
}

} // namespace

int main(int count, char** arguments)
{
    if (count != 3 && count != 4)
    {
        std::fprintf(stderr, "usage: run_engine PLAN PICTURE.f32 [PLUGIN.so]\n");
        return 2;
    }
    try
    {
        run(arguments[1], arguments[2], count == 4 ? arguments[3] : nullptr);
        return 0;
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 1;
    }
}
