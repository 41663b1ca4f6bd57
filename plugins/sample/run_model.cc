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

// Of the one input, a float32 tensor; of any other nothing.
std::vector<int64_t> inputShape(Ort::Session const& session)
{
    if (session.GetInputCount() != 1 || session.GetInputTypeInfo(0).GetONNXType() != ONNX_TYPE_TENSOR)
    {
        return {};
    }
    auto const type = session.GetInputTypeInfo(0);
    auto const tensor = type.GetTensorTypeAndShapeInfo();
    bool const fits = tensor.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    return fits ? tensor.GetShape() : std::vector<int64_t>{};
}

// What one picture gives: [1, C] of a rank of two, [1] of one.
void requireTensor(Ort::Value const& value, std::string const& name, ONNXTensorElementDataType type, size_t rank)
{
    bool fits = value.IsTensor();
    if (fits)
    {
        auto const tensor = value.GetTensorTypeAndShapeInfo();
        auto const shape = tensor.GetShape();
        fits = tensor.GetElementType() == type && shape.size() == rank && shape[0] == 1 && shape.back() >= 1;
    }
    if (!fits)
    {
        sample::fail(name + " is not what one picture gives; name a file of `asvit-deploy export`");
    }
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

    auto shape = inputShape(session);
    if (shape.size() != 4 || shape[0] > 1 || shape[1] != 3 || shape[2] < 1 || shape[2] != shape[3])
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
    if (names.empty())
    {
        sample::fail(std::string(model) + " gives nothing; name a file of `asvit-deploy export`");
    }
    auto const outputs =
        session.Run(Ort::RunOptions{}, inputNames, &images, 1, outputNames.data(), outputNames.size());

    requireTensor(outputs[0], names[0], ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 2);
    auto const count = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount();
    auto const* const values = outputs[0].GetTensorData<float>();
    std::vector<float> const answer(values, values + count);
    names[0] == "embedding" ? sample::printEmbedding(answer) : sample::printBest(answer);
    std::vector<int64_t> lengths;
    for (size_t i = 1; i < outputs.size(); ++i)
    {
        requireTensor(outputs[i], names[i], ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 1);
        lengths.push_back(*outputs[i].GetTensorData<int64_t>());
    }
    std::string const prefix = field(session, "asvit_prefix");
    sample::printKept(lengths, prefix.empty() ? 1 : std::strtoll(prefix.c_str(), nullptr, 10));
}

} // namespace

int main(int count, char** arguments)
{
    return sample::runMain(count, arguments, "usage: run_model MODEL.onnx PICTURE.ppm [LIBRARY.so]", run);
}
