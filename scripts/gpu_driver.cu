// Drives a library of the TensorRT plugin on a GPU, without TensorRT: getCreators -> createPlugin -> enqueue.
//
//   driver LIBRARY run < cases      runs the cases of tests/cpp/trt/driver.cpp and writes all output buffers to stdout;
//                                   with ASVIT_GRAPH=1 through a captured graph, filled only after the capture
//   driver LIBRARY bench            writes bandwidth and latency to stdout, as JSON
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include <NvInferRuntime.h>
#include <cuda_runtime.h>

using namespace nvinfer1;

namespace
{

constexpr int kIN = 3;
constexpr int kOUT = 4;
constexpr int kPOISON = 0xA5;

void require(bool condition, char const* what)
{
    if (!condition)
    {
        std::fprintf(stderr, "gpu_driver: %s\n", what);
        std::exit(1);
    }
}

void check(cudaError_t error) { require(error == cudaSuccess, cudaGetErrorString(error)); }

IPluginCreatorV3One* creatorOf(char const* path)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    require(library != nullptr, library == nullptr ? dlerror() : "");
    auto const entry = reinterpret_cast<IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    require(entry != nullptr, "getCreators is missing");
    int32_t count = 0;
    auto const* const creators = entry(count);
    require(count == 1, "not one creator");
    return static_cast<IPluginCreatorV3One*>(creators[0]);
}

// Device memory that begins `offset` bytes after an aligned place and ends where its allocation ends.
class Buffer
{
public:
    explicit Buffer(size_t bytes, size_t offset = 0) : mBytes(bytes), mOffset(offset)
    {
        check(cudaMalloc(&mMemory, std::max<size_t>(bytes + offset, 1)));
        poison();
    }
    Buffer(Buffer&& other) noexcept : mBytes(other.mBytes), mOffset(other.mOffset), mMemory(other.mMemory)
    {
        other.mMemory = nullptr;
    }
    ~Buffer() { cudaFree(mMemory); }

    void* data() const { return static_cast<char*>(mMemory) + mOffset; }
    size_t bytes() const { return mBytes; }
    void poison() const { check(cudaMemset(data(), kPOISON, mBytes)); }
    void put(void const* host) const { check(cudaMemcpy(data(), host, mBytes, cudaMemcpyHostToDevice)); }

    std::vector<char> get() const
    {
        std::vector<char> host(mBytes);
        check(cudaMemcpy(host.data(), data(), mBytes, cudaMemcpyDeviceToHost));
        return host;
    }

private:
    size_t mBytes;
    size_t mOffset;
    void* mMemory{};
};

// One call's plugin, descriptions and buffers. Type is 0 float, 1 half, 2 bfloat16.
class Call
{
public:
    Call(IPluginCreatorV3One& creator, int64_t images, int64_t rows, int64_t width, int64_t type, size_t offset = 0)
        : mPlugin(creator.createPlugin("node", nullptr, TensorRTPhase::kRUNTIME))
    {
        constexpr std::array kPAYLOADS{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
        require(mPlugin != nullptr, "no plugin was created");
        auto* const build =
            static_cast<IPluginV3OneBuild*>(mPlugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        mRuntime = static_cast<IPluginV3OneRuntime*>(mPlugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        std::array<DataType, kIN> const types{kPAYLOADS.at(static_cast<size_t>(type)), DataType::kFLOAT,
                                              DataType::kFLOAT};
        std::array<DataType, kOUT> made{};
        require(build->getOutputDataTypes(made.data(), kOUT, types.data(), kIN) == 0, "getOutputDataTypes fails");
        mSizeBytes = made[3] == DataType::kINT64 ? 8 : 4;
        std::array<Dims, kIN + kOUT> const shapes{
            Dims{3, {images, rows, width}}, Dims{2, {images, rows - 1}}, Dims{0, {}}, Dims{3, {images, -1, width}},
            Dims{2, {images, -1}},          Dims{1, {images}},           Dims{0, {}}};
        std::array<DynamicPluginTensorDesc, kIN + kOUT> most{};
        for (int i = 0; i < kIN + kOUT; ++i)
        {
            mDescs[i].type = i < kIN ? types[i] : made[i - kIN];
            mDescs[i].format = TensorFormat::kLINEAR;
            mDescs[i].dims = shapes[i];
            most[i].desc = mDescs[i];
            most[i].min = most[i].opt = most[i].max = shapes[i];
        }
        size_t const places = images * rows;
        size_t const payload = places * width * (type == 0 ? 4 : 2);
        size_t const workspace = build->getWorkspaceSize(most.data(), kIN, most.data() + kIN, kOUT);
        for (auto const& [bytes, shift] : {std::pair{payload, offset}, {(places - images) * 4, 0}, {4, 0},
                                           {payload, offset}, {places * 8, 0}, {images * 8UL, 0},
                                           {static_cast<size_t>(mSizeBytes), 0}, {workspace, 0}})
        {
            mBuffers.emplace_back(bytes, shift);
        }
    }

    int32_t enqueue(cudaStream_t stream) const
    {
        std::array<void const*, kIN> const inputs{at(0), at(1), at(2)};
        std::array<void*, kOUT> const outputs{at(3), at(4), at(5), at(6)};
        return mRuntime->enqueue(mDescs.data(), mDescs.data() + kIN, inputs.data(), outputs.data(), at(7), stream);
    }

    void* at(int i) const { return mBuffers[i].data(); }
    Buffer const& input(int i) const { return mBuffers[i]; }
    Buffer const& output(int i) const { return mBuffers[kIN + i]; }
    int64_t sizeBytes() const { return mSizeBytes; }

private:
    std::unique_ptr<IPluginV3> mPlugin;
    IPluginV3OneRuntime* mRuntime;
    std::array<PluginTensorDesc, kIN + kOUT> mDescs{};
    std::vector<Buffer> mBuffers;
    int64_t mSizeBytes;
};

class Graph
{
public:
    Graph(cudaStream_t stream, std::function<void()> const& body)
    {
        cudaGraph_t graph{};
        check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
        body();
        check(cudaStreamEndCapture(stream, &graph));
        check(cudaGraphInstantiate(&mGraph, graph, 0));
        check(cudaGraphDestroy(graph));
    }
    ~Graph() { cudaGraphExecDestroy(mGraph); }

    void launch(cudaStream_t stream) const { check(cudaGraphLaunch(mGraph, stream)); }

private:
    cudaGraphExec_t mGraph{};
};

std::vector<char> readInput(size_t bytes)
{
    std::vector<char> host(bytes);
    require(std::fread(host.data(), 1, bytes, stdin) == bytes, "a case is cut short");
    return host;
}

void writeOutput(void const* data, size_t bytes)
{
    require(std::fwrite(data, 1, bytes, stdout) == bytes, "the result cannot be written");
}

void runCases(IPluginCreatorV3One& creator, cudaStream_t stream, bool asGraph)
{
    std::array<int64_t, 5> head{};
    while (std::fread(head.data(), sizeof head, 1, stdin) == 1)
    {
        Call const call(creator, head[0], head[1], head[2], head[3], static_cast<size_t>(head[4]));
        int32_t status = 0;
        std::unique_ptr<Graph> graph;
        if (asGraph)
        {
            graph = std::make_unique<Graph>(stream, [&] { status = call.enqueue(stream); });
        }
        for (int i = 0; i < kIN; ++i)
        {
            call.input(i).put(readInput(call.input(i).bytes()).data());
        }
        for (int replay = 0; asGraph && replay < 2; ++replay)
        {
            for (int i = 0; i < kOUT; ++i)
            {
                call.output(i).poison();
            }
            check(cudaDeviceSynchronize());
            graph->launch(stream);
            check(cudaStreamSynchronize(stream));
        }
        if (!asGraph)
        {
            check(cudaDeviceSynchronize());
            status = call.enqueue(stream);
            check(cudaStreamSynchronize(stream));
        }
        std::array<int64_t, 2> const answer{status, call.sizeBytes()};
        writeOutput(answer.data(), sizeof answer);
        for (int i = 0; i < kOUT; ++i)
        {
            auto const host = call.output(i).get();
            writeOutput(host.data(), host.size());
        }
    }
}

// Inputs of which that share passes the threshold; returns the bytes that are read and written.
double fill(Call const& call, int64_t images, int64_t rows, int64_t width, double keep)
{
    std::mt19937 random(1);
    std::vector<float> scores(images * (rows - 1));
    int64_t const kept = std::max<int64_t>(1, static_cast<int64_t>(keep * static_cast<double>(rows - 1)));
    for (auto begin = scores.begin(); begin != scores.end(); begin += rows - 1)
    {
        std::fill(begin, begin + kept, 1.0F); // every image keeps as many, so nothing is padded
        std::shuffle(begin, begin + rows - 1, random);
    }
    float const threshold = 0.5F;
    call.input(1).put(scores.data());
    call.input(2).put(&threshold);
    return 2.0 * 2.0 * static_cast<double>(images * (1 + kept) * width);
}

// Median microseconds of `body`, between two events around it.
double median(cudaStream_t stream, int repeats, std::function<void()> const& body)
{
    cudaEvent_t begin{};
    cudaEvent_t end{};
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
    std::vector<float> times(repeats);
    for (int i = -5; i < repeats; ++i)
    {
        check(cudaEventRecord(begin, stream));
        body();
        check(cudaEventRecord(end, stream));
        check(cudaEventSynchronize(end));
        check(cudaEventElapsedTime(&times[std::max(i, 0)], begin, end));
    }
    check(cudaEventDestroy(begin));
    check(cudaEventDestroy(end));
    std::nth_element(times.begin(), times.begin() + repeats / 2, times.end());
    return 1e3 * times[repeats / 2];
}

// Several sets of buffers in turn, so that the cache holds none of them when its turn comes again; both sides as one
// captured graph, so that launching costs the same.
void bandwidth(IPluginCreatorV3One& creator, cudaStream_t stream, double keep)
{
    constexpr int64_t kIMAGES = 64;
    constexpr int64_t kROWS = 577;
    constexpr int64_t kWIDTH = 768;
    constexpr int kSETS = 8;
    std::vector<std::unique_ptr<Call>> calls;
    double bytes = 0;
    for (int i = 0; i < kSETS; ++i)
    {
        calls.push_back(std::make_unique<Call>(creator, kIMAGES, kROWS, kWIDTH, 1));
        bytes = fill(*calls.back(), kIMAGES, kROWS, kWIDTH, keep);
    }
    auto const once = [&](auto const& body)
    {
        Graph const graph(stream,
                          [&]
                          {
                              for (auto const& call : calls)
                              {
                                  body(*call);
                              }
                          });
        return median(stream, 30, [&] { graph.launch(stream); }) / kSETS;
    };
    double const kernel = once([&](Call const& call) { require(call.enqueue(stream) == 0, "enqueue fails"); });
    auto const half = static_cast<size_t>(bytes / 2); // a copy reads and writes as much
    double const copy = once(
        [&](Call const& call)
        { check(cudaMemcpyAsync(call.at(3), call.at(0), half, cudaMemcpyDeviceToDevice, stream)); });
    std::printf("{\"kept\": %.2f, \"bytes\": %.0f, \"us\": %.3f, \"gb_per_s\": %.1f, \"copy_us\": %.3f, "
                "\"copy_gb_per_s\": %.1f, \"share\": %.4f}",
                keep, bytes, kernel, bytes / kernel / 1e3, copy, bytes / copy / 1e3, copy / kernel);
}

void latency(IPluginCreatorV3One& creator, cudaStream_t stream)
{
    constexpr int kIN_A_ROW = 200;
    Call const call(creator, 1, 197, 384, 1);
    fill(call, 1, 197, 384, 0.7);
    auto const one = [&] { require(call.enqueue(stream) == 0, "enqueue fails"); };
    auto const many = [&]
    {
        for (int i = 0; i < kIN_A_ROW; ++i)
        {
            one();
        }
    };
    Graph const graph(stream, many);
    double const empty = median(stream, 200, [] {});
    double const single = median(stream, 200, one);
    double const inStream = median(stream, 20, many) / kIN_A_ROW;
    double const inGraph = median(stream, 20, [&] { graph.launch(stream); }) / kIN_A_ROW;
    std::printf("{\"single_us\": %.3f, \"events_alone_us\": %.3f, \"in_stream_us\": %.3f, \"in_graph_us\": %.3f}",
                single, empty, inStream, inGraph);
}

void bench(IPluginCreatorV3One& creator, cudaStream_t stream)
{
    std::printf("{\"bandwidth\": [");
    bandwidth(creator, stream, 0.7);
    std::printf(", ");
    bandwidth(creator, stream, 1.0);
    std::printf("], \"latency\": ");
    latency(creator, stream);
    std::printf("}\n");
}

} // namespace

int main(int count, char** arguments)
{
    require(count == 3, "give a library, and run or bench");
    std::string const what = arguments[2];
    require(what == "run" || what == "bench", "what to do is run or bench");
    int devices = 0;
    check(cudaGetDeviceCount(&devices));
    cudaStream_t stream{};
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    IPluginCreatorV3One* const creator = creatorOf(arguments[1]);
    what == "bench" ? bench(*creator, stream) : runCases(*creator, stream, std::getenv("ASVIT_GRAPH") != nullptr);
    check(cudaStreamDestroy(stream));
}
