// Runs one picture through an ONNX file of ours in ONNX Runtime, on the CPU; prints the best five classes, or of an
// embedding its width, its norm and its first numbers, and how many tokens each stage kept.
//
//   run_model MODEL.onnx PICTURE.ppm [LIBRARY.so]
//
// Preprocessing and prefix come from the file's own metadata. The library is the op's, see `asvit-deploy build-plugins
// ort`; without it the function in the file runs.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

#include "answer.h"
#include "picture.h"

namespace
{

// A field of the metadata, as JSON; empty where there is none.
std::string field(Ort::Session const& session, char const* key)
{
    Ort::AllocatorWithDefaultOptions allocator;
    auto const value = session.GetModelMetadata().LookupCustomMetadataMapAllocated(key, allocator);
    return value == nullptr ? "" : value.get();
}

void run(char const* model, char const* picture, char const* library)
{
    Ort::Env const environment(ORT_LOGGING_LEVEL_FATAL, "asvit");
    Ort::SessionOptions options;
    options.SetIntraOpNumThreads(1);
    if (library != nullptr)
    {
        options.RegisterCustomOpsLibrary(library);
    }
    Ort::Session session(environment, model, options);

    auto shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
    if (session.GetInputCount() != 1 || shape.size() != 4 || shape[1] != 3 || shape[2] < 1 || shape[2] != shape[3])
    {
        sample::fail(std::string(model) + " takes no square pictures; name a file of `asvit-deploy export`");
    }
    shape[0] = 1;
    auto const rules = sample::readRules(field(session, "asvit_preprocessing"));
    auto input = sample::preprocess(sample::readPpm(picture), rules, shape[2]);

    Ort::AllocatorWithDefaultOptions allocator;
    std::string const inputName = session.GetInputNameAllocated(0, allocator).get();
    std::vector<std::string> names;
    for (size_t i = 0; i < session.GetOutputCount(); ++i)
    {
        std::string name = session.GetOutputNameAllocated(i, allocator).get();
        if (i == 0 || name.rfind("length_", 0) == 0) // and not what `--stage-outputs` adds
        {
            names.push_back(std::move(name));
        }
    }
    std::vector<char const*> outputNames;
    for (auto const& name : names)
    {
        outputNames.push_back(name.c_str());
    }
    char const* const inputNames[] = {inputName.c_str()};
    auto const memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto const images =
        Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape.data(), shape.size());
    auto const outputs =
        session.Run(Ort::RunOptions{}, inputNames, &images, 1, outputNames.data(), outputNames.size());

    auto const count = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount();
    auto const* const values = outputs[0].GetTensorData<float>();
    std::vector<float> const answer(values, values + count);
    names[0] == "embedding" ? sample::printEmbedding(answer) : sample::printBest(answer);
    std::vector<int64_t> lengths;
    for (size_t i = 1; i < outputs.size(); ++i)
    {
        lengths.push_back(*outputs[i].GetTensorData<int64_t>());
    }
    std::string const prefix = field(session, "asvit_prefix");
    sample::printKept(lengths, prefix.empty() ? 1 : std::strtoll(prefix.c_str(), nullptr, 10));
}

} // namespace

int main(int count, char** arguments)
{
    if (count != 3 && count != 4)
    {
        std::fprintf(stderr, "usage: run_model MODEL.onnx PICTURE.ppm [LIBRARY.so]\n");
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
