// What IPluginRegistry::loadLibrary looks for. No symbol of TensorRT is needed, so the library is not linked to it.
#include "threshold_compact_plugin.h"

#define ASVIT_EXPORT extern "C" __attribute__((visibility("default")))

ASVIT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static asvit::ThresholdCompactCreator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

// Nothing is logged: ILogger differs between TensorRT 10 and 11, and this library may meet either.
ASVIT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}
