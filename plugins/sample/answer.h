// What a network says of a picture, as the samples print it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <numeric>
#include <vector>

namespace sample
{

inline void printEmbedding(std::vector<float> const& embedding)
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

// The best five classes and their probabilities; the score itself where there is one output.
inline void printBest(std::vector<float> const& logits)
{
    if (logits.empty())
    {
        std::printf("no class\n");
        return;
    }
    if (logits.size() == 1)
    {
        std::printf("score %.6g\n", double{logits[0]});
        return;
    }
    std::vector<size_t> order(logits.size());
    std::iota(order.begin(), order.end(), size_t{0});
    auto const shown = std::min<size_t>(5, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(),
                      [&](size_t a, size_t b) { return logits[a] > logits[b]; });
    double const top = logits[order[0]];
    double const sum = std::accumulate(logits.begin(), logits.end(), 0.0,
                                       [&](double total, float x) { return total + std::exp(double{x} - top); });
    for (size_t i = 0; i < shown; ++i)
    {
        std::printf("class %zu  %.4f\n", order[i], std::exp(double{logits[order[i]]} - top) / sum);
    }
}

// How many tokens each stage keeps, the prefix not counted; nothing of a dense network.
inline void printKept(std::vector<int64_t> const& lengths, int64_t prefix)
{
    for (size_t stage = 0; stage < lengths.size(); ++stage)
    {
        std::printf("%s%lld", stage == 0 ? "kept tokens per stage: " : ", ",
                    static_cast<long long>(lengths[stage] - prefix));
    }
    std::printf("%s", lengths.empty() ? "" : "\n");
}

//! What both programs do with their arguments: a file, a picture and perhaps a library (else null).
//! Returns the exit code; what fails is one line on stderr.
template <typename Work>
int runMain(int count, char** arguments, char const* usage, Work work)
{
    if (count != 3 && count != 4)
    {
        std::fprintf(stderr, "%s\n", usage);
        return 2;
    }
    try
    {
        work(arguments[1], arguments[2], count == 4 ? arguments[3] : nullptr);
        return 0;
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 1;
    }
}

} // namespace sample
