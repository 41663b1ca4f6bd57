// One call of the plugin with everything that TensorRT would hand to it.
#pragma once

#include <dlfcn.h>

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <NvInferRuntime.h>

#include "device.h"

constexpr int kIN = 3;
constexpr int kOUT = 4;

inline nvinfer1::IPluginCreatorV3One* creatorOf(char const* path)
{
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    require(library != nullptr, library == nullptr ? dlerror() : "");
    auto const entry =
        reinterpret_cast<nvinfer1::IPluginCreatorInterface* const* (*)(int32_t&)>(dlsym(library, "getCreators"));
    require(entry != nullptr, "getCreators is missing");
    int32_t count = 0;
    auto const* const creators = entry(count);
    require(count == 1, "not one creator");
    return static_cast<nvinfer1::IPluginCreatorV3One*>(creators[0]);
}

// A plugin and its faces. Engines are built with one and run with others that were attached to their contexts.
struct Plugin
{
    std::unique_ptr<nvinfer1::IPluginV3> owner;
    nvinfer1::IPluginV3OneBuild* build;
    nvinfer1::IPluginV3OneRuntime* runtime;

    explicit Plugin(nvinfer1::IPluginV3* plugin) : owner(plugin)
    {
        using nvinfer1::PluginCapabilityType;
        require(plugin != nullptr, "no plugin was created");
        build = static_cast<nvinfer1::IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));
        runtime =
            static_cast<nvinfer1::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
        require(build != nullptr && runtime != nullptr, "a capability is missing");
    }
    explicit Plugin(nvinfer1::IPluginCreatorV3One& creator)
        : Plugin(creator.createPlugin("node", nullptr, nvinfer1::TensorRTPhase::kRUNTIME))
    {
    }

    Plugin attached() const { return Plugin(runtime->attachToContext(nullptr)); }
};

struct Shape
{
    int64_t images;
    int64_t rows;
    int64_t width;
    int64_t type; // 0 float, 1 half, 2 bfloat16
    int64_t offset;
    int64_t prefix = 1;

    size_t places() const { return static_cast<size_t>(images * rows); }
    size_t payload() const { return places() * static_cast<size_t>(width) * (type == 0 ? 4 : 2); }
    size_t scores() const { return static_cast<size_t>(images * (rows - prefix)) * sizeof(float); }
};

using Descriptions = std::array<nvinfer1::PluginTensorDesc, kIN + kOUT>;
using Ranges = std::array<nvinfer1::DynamicPluginTensorDesc, kIN + kOUT>;

// `sizeBits` 32 or 64 is what an engine was built with; 0 leaves it to the library.
inline Descriptions describe(Plugin const& plugin, Shape const& shape, int sizeBits)
{
    using nvinfer1::DataType;
    using nvinfer1::Dims;
    constexpr std::array kPAYLOADS{DataType::kFLOAT, DataType::kHALF, DataType::kBF16};
    std::array<DataType, kIN> const types{kPAYLOADS.at(static_cast<size_t>(shape.type)), DataType::kFLOAT,
                                          DataType::kFLOAT};
    std::array<DataType, kOUT> made{};
    require(plugin.build->getOutputDataTypes(made.data(), kOUT, types.data(), kIN) == 0, "getOutputDataTypes fails");
    std::array<Dims, kIN + kOUT> const shapes{Dims{3, {shape.images, shape.rows, shape.width}},
                                              Dims{2, {shape.images, shape.rows - shape.prefix}},
                                              Dims{0, {}},
                                              Dims{3, {shape.images, -1, shape.width}},
                                              Dims{2, {shape.images, -1}},
                                              Dims{1, {shape.images}},
                                              Dims{0, {}}};
    Descriptions all{};
    for (int i = 0; i < kIN + kOUT; ++i)
    {
        all[i].type = i < kIN ? types[i] : made[i - kIN];
        all[i].format = nvinfer1::TensorFormat::kLINEAR;
        all[i].dims = shapes[i];
    }
    if (sizeBits != 0)
    {
        all[kIN + 3].type = sizeBits == 64 ? DataType::kINT64 : DataType::kINT32;
    }
    return all;
}

// What the builder asks with: shapes that vary up to `most`.
inline Ranges ranges(Plugin const& plugin, Shape const& most)
{
    Ranges all{};
    Descriptions const fixed = describe(plugin, most, 0);
    for (int i = 0; i < kIN + kOUT; ++i)
    {
        all[i].desc = fixed[i];
        all[i].min = all[i].opt = all[i].max = fixed[i].dims;
    }
    return all;
}

inline size_t workspaceBytes(Plugin const& plugin, Shape const& most)
{
    Ranges const all = ranges(plugin, most);
    return plugin.build->getWorkspaceSize(all.data(), kIN, all.data() + kIN, kOUT);
}

class Call
{
public:
    // `workspace`: shared between calls, or null for one of its own.
    Call(Plugin plugin, Shape const& shape, int sizeBits, void* workspace = nullptr)
        : mPlugin(std::move(plugin)), mDescs(describe(mPlugin, shape, sizeBits)),
          mSizeBytes(mDescs[kIN + 3].type == nvinfer1::DataType::kINT64 ? 8 : 4), mWorkspace(workspace)
    {
        size_t const places = shape.places();
        auto const images = static_cast<size_t>(shape.images);
        auto const offset = static_cast<size_t>(shape.offset);
        for (auto const& [bytes, shift] : {std::pair{shape.payload(), offset}, {shape.scores(), 0}, {4, 0},
                                           {shape.payload(), offset}, {places * 8, 0}, {images * 8, 0},
                                           {static_cast<size_t>(mSizeBytes), 0}})
        {
            mBuffers.emplace_back(bytes, shift);
        }
        if (mWorkspace == nullptr)
        {
            mBuffers.emplace_back(workspaceBytes(mPlugin, shape));
            mWorkspace = mBuffers.back().data();
        }
        changeShape();
    }

    void changeShape() const
    {
        require(mPlugin.runtime->onShapeChange(mDescs.data(), kIN, mDescs.data() + kIN, kOUT) == 0,
                "onShapeChange fails");
    }

    // `tokens`: where another call has left them, or null for this call's own buffer.
    int32_t enqueue(cudaStream_t stream, void const* tokens = nullptr) const
    {
        std::array<void const*, kIN> const inputs{tokens == nullptr ? at(0) : tokens, at(1), at(2)};
        std::array<void*, kOUT> const outputs{at(3), at(4), at(5), at(6)};
        return mPlugin.runtime->enqueue(mDescs.data(), mDescs.data() + kIN, inputs.data(), outputs.data(), mWorkspace,
                                        stream);
    }

    void* at(int i) const { return mBuffers[i].data(); }
    Buffer const& input(int i) const { return mBuffers[i]; }
    Buffer const& output(int i) const { return mBuffers[kIN + i]; }
    int64_t sizeBytes() const { return mSizeBytes; }

    // The size tensor, read back as an engine's host does.
    int64_t size() const
    {
        auto const host = output(3).get();
        int64_t value = 0;
        for (int i = static_cast<int>(host.size()) - 1; i >= 0; --i)
        {
            value = value * 256 + static_cast<unsigned char>(host[i]);
        }
        return value;
    }

private:
    Plugin mPlugin;
    Descriptions mDescs;
    int64_t mSizeBytes;
    std::vector<Buffer> mBuffers;
    void* mWorkspace;
};
