// For loaders that only open a library (trtexec --staticPlugins, Polygraphy --plugins): the plugin registers itself.
// getInferLibVersion and getPluginRegistry come from the TensorRT that is in the process.
#include "threshold_compact_plugin.h"

#include <cstdio>

namespace
{

// The registry is laid out anew from TensorRT 10 to 11. TensorRT-RTX, whose version is 1, has the newer layout (tried:
// 1.7.1).
bool fits(int32_t major) { return major == NV_TENSORRT_MAJOR || (major == 1 && NV_TENSORRT_MAJOR >= 11); }

struct Registration
{
    asvit::ThresholdCompactCreator mCreator;

    Registration()
    {
        int32_t const major = getInferLibVersion() / 10000;
        if (fits(major))
        {
            getPluginRegistry()->registerCreator(mCreator, mCreator.getPluginNamespace());
            return;
        }
        std::fprintf(stderr,
                     "ThresholdCompact is not registered: this library was built for TensorRT %d, and the process runs "
                     "TensorRT %d; set TensorRT_ROOT to a release with its headers (RTX is 1 and wants 11) and run "
                     "`asvit-deploy build-plugins trt`\n",
                     NV_TENSORRT_MAJOR, major);
    }
};

Registration gRegistration;

} // namespace
