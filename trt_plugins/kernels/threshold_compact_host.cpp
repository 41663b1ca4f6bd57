// The host twin: the launch function over buffers in host memory, for tests and for building engines without CUDA.
#include "threshold_compact.cuh"

namespace
{

using asvit::Row;

// Lists the rows of one image that stay; returns how many.
int64_t countAndScan(float const* scores, float threshold, uint32_t tokens, uint32_t prefix, Row* rows)
{
    uint32_t above = 0;
    uint64_t best = 0;
    for (uint32_t row = 0; row < prefix; ++row)
    {
        rows[row] = static_cast<Row>(row);
    }
    for (uint32_t token = 0; token < tokens; ++token)
    {
        uint64_t const rank = asvit::rankOf(scores[token], token);
        best = rank > best ? rank : best;
        if (asvit::keeps(scores[token], threshold))
        {
            rows[prefix + above++] = static_cast<Row>(prefix + token);
        }
    }
    if (above == 0)
    {
        rows[prefix] = static_cast<Row>(prefix + asvit::tokenOf(best));
    }
    return asvit::lengthOf(prefix, above);
}

// Fills `size` rows of one image's outputs, of which `length` are listed.
void gather(char const* tokens, Row const* rows, int64_t length, int64_t size, size_t rowBytes, char* compact,
            int64_t* index)
{
    for (int64_t row = 0; row < size; ++row)
    {
        bool const kept = row < length;
        index[row] = kept ? rows[row] : -1;
        if (kept && rowBytes > 0)
        {
            std::memcpy(compact + row * rowBytes, tokens + rows[row] * rowBytes, rowBytes);
        }
        else if (rowBytes > 0)
        {
            std::memset(compact + row * rowBytes, 0, rowBytes);
        }
    }
}

} // namespace

size_t asvitThresholdCompactWorkspace(int64_t images, int64_t rows) noexcept
{
    return asvit::workspaceBytes(images, rows);
}

int32_t asvitThresholdCompactCallBytes() noexcept { return sizeof(AsvitThresholdCompact); }

int32_t asvitThresholdCompactCount(AsvitThresholdCompact const* call, CUstream_st*) noexcept
{
    if (!asvit::countable(*call))
    {
        return kASVIT_BAD_CALL;
    }
    auto* const rows = static_cast<Row*>(call->workspace);
    auto const prefix = static_cast<uint32_t>(call->prefix);
    auto const tokens = static_cast<uint32_t>(call->rows) - prefix;
    int64_t size = 0;
    for (int64_t image = 0; image < call->images; ++image)
    {
        int64_t const length =
            countAndScan(call->scores + image * tokens, *call->threshold, tokens, prefix, rows + image * call->rows);
        call->length[image] = length;
        size = length > size ? length : size;
    }
    auto const small = static_cast<int32_t>(size);
    std::memcpy(call->size, call->sizeBytes == 8 ? static_cast<void const*>(&size) : &small,
                static_cast<size_t>(call->sizeBytes));
    return 0;
}

int32_t asvitThresholdCompactGather(AsvitThresholdCompact const* call, CUstream_st*) noexcept
{
    if (!asvit::allowed(*call))
    {
        return kASVIT_BAD_CALL;
    }
    auto const* const rows = static_cast<Row const*>(call->workspace);
    int64_t const size =
        call->sizeBytes == 8 ? *static_cast<int64_t const*>(call->size) : *static_cast<int32_t const*>(call->size);
    size_t const rowBytes = static_cast<size_t>(call->width) * static_cast<size_t>(call->elementBytes);
    for (int64_t image = 0; image < call->images; ++image)
    {
        gather(static_cast<char const*>(call->tokens) + image * call->rows * rowBytes, rows + image * call->rows,
               call->length[image], size, rowBytes, static_cast<char*>(call->compact) + image * size * rowBytes,
               call->index + image * size);
    }
    return 0;
}

int32_t asvitThresholdCompact(AsvitThresholdCompact const* call, CUstream_st* stream) noexcept
{
    if (!asvit::allowed(*call))
    {
        return kASVIT_BAD_CALL;
    }
    asvitThresholdCompactCount(call, stream);
    return asvitThresholdCompactGather(call, stream);
}
