// Bandwidth beside a device copy, and latency, as JSON on stdout.
#pragma once

#include <memory>
#include <random>

#include "call.h"

// Inputs of which that share passes the threshold; returns the bytes that are read and written.
inline double fill(Call const& call, int64_t images, int64_t rows, int64_t width, double keep)
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
inline double median(cudaStream_t stream, int repeats, std::function<void()> const& body)
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
inline void bandwidth(nvinfer1::IPluginCreatorV3One& creator, cudaStream_t stream, double keep)
{
#ifdef ASVIT_EMULATED
    constexpr int64_t kIMAGES = 2; // nothing is measured there
#else
    constexpr int64_t kIMAGES = 64;
#endif
    constexpr int64_t kROWS = 577;
    constexpr int64_t kWIDTH = 768;
    constexpr int kSETS = 8;
    std::vector<std::unique_ptr<Call>> calls;
    double bytes = 0;
    for (int i = 0; i < kSETS; ++i)
    {
        calls.push_back(std::make_unique<Call>(Plugin(creator), Shape{kIMAGES, kROWS, kWIDTH, 1, 0}, 0));
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

inline void latency(nvinfer1::IPluginCreatorV3One& creator, cudaStream_t stream)
{
    constexpr int kIN_A_ROW = 200;
    Call const call(Plugin(creator), Shape{1, 197, 384, 1, 0}, 0);
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

inline void bench(nvinfer1::IPluginCreatorV3One& creator, cudaStream_t stream)
{
    std::printf("{\"bandwidth\": [");
    bandwidth(creator, stream, 0.7);
    std::printf(", ");
    bandwidth(creator, stream, 1.0);
    std::printf("], \"latency\": ");
    latency(creator, stream);
    std::printf("}\n");
}

