// The samples' preprocessing by itself: RULES.json PICTURE.ppm SIZE -> float32 [3, SIZE, SIZE] on stdout.
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "../../plugins/sample/picture.h"

int main(int, char** arguments)
{
    try
    {
        auto const rules = sample::readRules(sample::contentOf(arguments[1]));
        auto const input = sample::preprocess(sample::readPpm(arguments[2]), rules, std::atoi(arguments[3]));
        return std::fwrite(input.data(), sizeof(float), input.size(), stdout) == input.size() ? 0 : 1;
    }
    catch (std::exception const& error)
    {
        std::fprintf(stderr, "Error: %s\n", error.what());
        return 1;
    }
}
