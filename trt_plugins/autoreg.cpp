// For loaders that only open a library (trtexec --staticPlugins, Polygraphy --plugins): the plugin registers itself.
// Needs getPluginRegistry from the TensorRT that is in the process, of the major version of the headers.
#include "threshold_compact_plugin.h"

namespace
{

using asvit::ThresholdCompactCreator;
REGISTER_TENSORRT_PLUGIN(ThresholdCompactCreator);

} // namespace
