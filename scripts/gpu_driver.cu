// Drives a library of the TensorRT plugin on a GPU, without TensorRT: getCreators -> createPlugin -> attachToContext ->
// onShapeChange -> enqueue.
//
//   driver LIBRARY MODE [32 | 64] < cases
//
// 32 and 64 are the bits of the engine's size tensor, which the library chooses otherwise. A case is images, rows,
// width, type (0 float, 1 half, 2 bfloat16), offset and prefix as int64, then the inputs; its result is the status and
// the bytes of `size` as int64, then the four output buffers. MODE:
//
//   run        every case in a plugin of its own
//   graph      the same through a captured graph, which is filled only after the capture and replayed twice
//   reshape    all cases through one plugin and one workspace of the largest shape, as one context meets changing shapes
//   streams    two cases at a time in two contexts on two streams, enqueued in turn ten times
//   chain      a case, then the number of further calls, and for each its threshold, its number of scores and the scores:
//              each call takes the tokens that the one before it left, and as many rows as it says in `size`
//   configure  what the builder asks: which shapes are taken; nothing is read or written
//   bench      bandwidth and latency as JSON
#include <cstring>
#include <string>

#include "gpu_driver/bench.h"

using namespace nvinfer1;

namespace
{

struct Case
{
    Shape shape;
    std::array<std::vector<char>, kIN> inputs;
};

bool readSome(void* to, size_t bytes)
{
    size_t const got = std::fread(to, 1, bytes, stdin);
    require(got == bytes || got == 0, "a case is cut short");
    return got == bytes;
}

void read(void* to, size_t bytes) { require(bytes == 0 || readSome(to, bytes), "a case is cut short"); }

bool readCase(Case& next)
{
    if (!readSome(&next.shape, sizeof next.shape))
    {
        return false;
    }
    std::array<size_t, kIN> const bytes{next.shape.payload(), next.shape.scores(), 4};
    for (int i = 0; i < kIN; ++i)
    {
        next.inputs[i].resize(bytes[i]);
        read(next.inputs[i].data(), bytes[i]);
    }
    return true;
}

void write(void const* data, size_t bytes)
{
    require(std::fwrite(data, 1, bytes, stdout) == bytes, "the result cannot be written");
}

void fill(Call const& call, Case const& given)
{
    for (int i = 0; i < kIN; ++i)
    {
        call.input(i).put(given.inputs[i].data());
    }
}

void writeResult(Call const& call, int32_t status)
{
    std::array<int64_t, 2> const answer{status, call.sizeBytes()};
    write(answer.data(), sizeof answer);
    for (int i = 0; i < kOUT; ++i)
    {
        auto const host = call.output(i).get();
        write(host.data(), host.size());
    }
}

void run(IPluginCreatorV3One& creator, int sizeBits, bool asGraph)
{
    Stream const stream;
    Case given;
    while (readCase(given))
    {
        Call const call(Plugin(creator), given.shape, sizeBits);
        int32_t status = 0;
        auto const enqueue = [&] { status = call.enqueue(stream); };
        std::unique_ptr<Graph> const graph = asGraph ? std::make_unique<Graph>(stream, enqueue) : nullptr;
        fill(call, given);
        for (int replay = 0; replay < (asGraph ? 2 : 1); ++replay)
        {
            for (int i = 0; i < kOUT; ++i)
            {
                call.output(i).poison();
            }
            check(cudaDeviceSynchronize());
            asGraph ? graph->launch(stream) : enqueue();
            stream.wait();
        }
        writeResult(call, status);
    }
}

void reshape(IPluginCreatorV3One& creator, int sizeBits)
{
    std::vector<Case> cases(1);
    while (readCase(cases.back()))
    {
        cases.emplace_back();
    }
    cases.pop_back();
    Shape most{};
    for (Case const& given : cases)
    {
        most = {std::max(most.images, given.shape.images), std::max(most.rows, given.shape.rows),
                std::max(most.width, given.shape.width), 0, 0};
    }
    Stream const stream;
    Plugin const plugin(creator);
    Buffer const workspace(workspaceBytes(plugin, most));
    Plugin const context = plugin.attached();
    for (Case const& given : cases)
    {
        Call const call(context.attached(), given.shape, sizeBits, workspace.data());
        fill(call, given);
        check(cudaDeviceSynchronize());
        int32_t const status = call.enqueue(stream);
        stream.wait();
        writeResult(call, status);
    }
}

void onTwoStreams(IPluginCreatorV3One& creator, int sizeBits)
{
    constexpr int kTURNS = 10;
    Plugin const plugin(creator);
    std::array<Stream, 2> const streams;
    std::array<Case, 2> given;
    while (readCase(given[0]) && readCase(given[1]))
    {
        std::array<Call, 2> const calls{Call(plugin.attached(), given[0].shape, sizeBits),
                                        Call(plugin.attached(), given[1].shape, sizeBits)};
        std::array<int32_t, 2> status{};
        for (int i = 0; i < 2; ++i)
        {
            fill(calls[i], given[i]);
        }
        check(cudaDeviceSynchronize());
        for (int turn = 0; turn < kTURNS; ++turn)
        {
            for (int i = 0; i < 2; ++i)
            {
                int32_t const now = calls[i].enqueue(streams[i]);
                status[i] = now == 0 ? status[i] : now;
            }
        }
        for (int i = 0; i < 2; ++i)
        {
            streams[i].wait();
            writeResult(calls[i], status[i]);
        }
    }
}

void chain(IPluginCreatorV3One& creator, int sizeBits)
{
    Plugin const plugin(creator);
    Stream const stream;
    Case given;
    while (readCase(given))
    {
        std::vector<std::unique_ptr<Call>> calls;
        calls.push_back(std::make_unique<Call>(plugin.attached(), given.shape, sizeBits));
        fill(*calls[0], given);
        int64_t further = 0;
        read(&further, sizeof further);
        int32_t status = calls[0]->enqueue(stream);
        stream.wait();
        writeResult(*calls[0], status);
        Shape shape = given.shape;
        shape.offset = 0;
        for (int64_t step = 0; step < further; ++step)
        {
            float threshold = 0;
            int64_t count = 0;
            read(&threshold, sizeof threshold);
            read(&count, sizeof count);
            std::vector<float> scores(static_cast<size_t>(count));
            read(scores.data(), scores.size() * sizeof(float));
            shape.rows = calls.back()->size();
            require(count == shape.images * (shape.rows - shape.prefix), "`size` is not what the scores were made for");
            auto next = std::make_unique<Call>(plugin.attached(), shape, sizeBits);
            next->input(1).put(scores.data());
            next->input(2).put(&threshold);
            status = next->enqueue(stream, calls.back()->at(kIN));
            stream.wait();
            writeResult(*next, status);
            calls.push_back(std::move(next));
        }
    }
}

void configure(IPluginCreatorV3One& creator)
{
    Plugin const plugin(creator);
    auto const takes = [&](int64_t rows, int64_t prefix = 1)
    {
        Ranges all = ranges(plugin, Shape{8, rows, 384, 1, 0, prefix});
        for (auto& range : all)
        {
            range.desc.dims.d[0] = range.desc.dims.nbDims > 0 ? -1 : range.desc.dims.d[0];
        }
        return plugin.build->configurePlugin(all.data(), kIN, all.data() + kIN, kOUT) == 0;
    };
    require(takes(2) && takes(197) && takes(4096), "configurePlugin refuses a shape of the contract");
    require(takes(198, 2) && takes(261, 5) && takes(6, 5), "configurePlugin refuses a prefix of the contract");
    require(!takes(4097), "configurePlugin takes more rows than the kernel can count");
    require(!takes(9, 9), "configurePlugin takes tokens of which none is of the image");
    require(!takes(9, 0), "configurePlugin takes scores that leave no prefix");
    Plugin const first = plugin.attached();
    Plugin const second = plugin.attached();
    require(first.owner != second.owner && first.owner != plugin.owner, "attachToContext gives no copy");
    require(workspaceBytes(plugin, {8, 577, 384, 1, 0}) >= workspaceBytes(plugin, {1, 2, 384, 1, 0}),
            "the workspace does not grow with the shape");
}

} // namespace

int main(int count, char** arguments)
{
    require(count == 3 || count == 4, "give a library, a mode and perhaps the bits of the size tensor");
    std::string const mode = arguments[2];
    int const sizeBits = count == 4 ? std::atoi(arguments[3]) : 0;
    require(sizeBits == 0 || sizeBits == 32 || sizeBits == 64, "the size tensor has 32 or 64 bits");
    int devices = 0;
    check(cudaGetDeviceCount(&devices));
    IPluginCreatorV3One& creator = *creatorOf(arguments[1]);
    std::vector<std::pair<std::string, std::function<void()>>> const modes{
        {"run", [&] { run(creator, sizeBits, false); }},
        {"graph", [&] { run(creator, sizeBits, true); }},
        {"reshape", [&] { reshape(creator, sizeBits); }},
        {"streams", [&] { onTwoStreams(creator, sizeBits); }},
        {"chain", [&] { chain(creator, sizeBits); }},
        {"configure", [&] { configure(creator); }},
        {"bench", [&] { bench(creator, Stream()); }}};
    auto const chosen = std::find_if(modes.begin(), modes.end(), [&](auto const& known) { return known.first == mode; });
    require(chosen != modes.end(), "the mode is none of run, graph, reshape, streams, chain, configure, bench");
    chosen->second();
}
