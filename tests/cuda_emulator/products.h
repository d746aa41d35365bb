// Tensor cores: mma.sync, and wgmma as asynchronous as it is.
#pragma once

#include "memory.h"
#include "numbers.h"

namespace emulator {

template <Kind kind> constexpr int depth_of = kind == Kind::half ? 16 : 32;

// The weights of int8 are signed, the tokens are not.
template <Kind kind> float element(uint32_t word, int index, bool is_token) {
    if (kind == Kind::half) return from_half(uint16_t(word >> 16 * index));
    const uint8_t byte = uint8_t(word >> 8 * index);
    if (kind == Kind::e4m3) return from_e4m3(byte);
    return is_token ? float(byte) : float(int8_t(byte));
}

// A sum as tensor cores are said to keep it: of e4m3 14 bits, counted from the largest of what is
// added, and what is below cut off.
template <Kind kind> double kept(double before, double products, double largest) {
    const double sum = before + products;
    if (kind != Kind::e4m3 || largest == 0 || !std::isfinite(sum)) return sum;
    const int last = std::ilogb(std::fmax(largest, std::fabs(before))) - 13;
    return std::ldexp(std::trunc(std::ldexp(sum, -last)), last);
}

// `largest` is wanted of e4m3 alone.
template <Kind kind> double dot(const float *x, const float *y, double &largest) {
    double sum = 0;
    largest = 0;
    for (int k = 0; k < depth_of<kind>; ++k) {
        const double product = double(x[k]) * y[k];
        sum += product;
        if (kind == Kind::e4m3) largest = std::max(largest, std::fabs(product));
    }
    return sum;
}

// One element of a product more, as 32 bits before and after.
template <Kind kind> uint32_t added(uint32_t before, const float *x, const float *y) {
    double largest;
    const double sum = dot<kind>(x, y, largest);
    if (kind == Kind::int8) return before + uint32_t(int32_t(sum));
    float value;
    std::memcpy(&value, &before, 4);
    value = float(kept<kind>(value, sum, largest));
    std::memcpy(&before, &value, 4);
    return before;
}

// m16n8k16 of float16 or m16n8k32 of bytes: the layouts are the same but for what a word holds.
struct WarpProduct { void *const *results; const uint32_t *a, *b; uint32_t c[4]; };

template <Kind kind> void finish_warp(WarpProduct *const *slots) {
    constexpr int per_word = kind == Kind::half ? 2 : 4, depth = depth_of<kind>;
    static float left[16][32], right[8][32];
    for (int lane = 0; lane < warp_size; ++lane)
        for (int word = 0; word < 4; ++word)
            for (int i = 0; i < per_word; ++i) {
                const int k = lane % 4 * per_word + i;
                left[lane / 4 + word % 2 * 8][k + word / 2 * depth / 2] =
                    element<kind>(slots[lane]->a[word], i, false);
                if (word < 2)
                    right[lane / 4][k + word * depth / 2] =
                        element<kind>(slots[lane]->b[word], i, true);
            }
    for (int lane = 0; lane < warp_size; ++lane)
        for (int i = 0; i < 4; ++i) {
            const float *x = left[lane / 4 + i / 2 * 8], *y = right[lane % 4 * 2 + i % 2];
            const uint32_t after = added<kind>(slots[lane]->c[i], x, y);
            std::memcpy(slots[lane]->results[i], &after, 4);
        }
}

void multiply_warp(Kind kind, void *const *results, const uint32_t *a, const uint32_t *b,
                   const void *c) {
    WarpProduct mine{results, a, b};
    std::memcpy(mine.c, c, sizeof mine.c);
    together(mine, [=](WarpProduct **slots) {
        if (kind == Kind::half) finish_warp<Kind::half>(slots);
        else if (kind == Kind::int8) finish_warp<Kind::int8>(slots);
        else finish_warp<Kind::e4m3>(slots);
    });
}

void fence_async() {
    for (uint32_t word : threads[current].unfenced) uses[word].fenced = true;
    threads[current].unfenced.clear();
}

void begin_group_product(Kind kind, void *const *results, int count, const uint32_t *weights,
                         uint64_t descriptor, bool adds) {
    GroupProduct product{kind, 2 * count};
    product.descriptor = descriptor;
    std::memcpy(product.weights, weights, sizeof product.weights);
    for (int i = 0; i < count; ++i) {
        product.before[i] = 0;
        if (adds) std::memcpy(&product.before[i], results[i], 4);
        product.results[i] = results[i];
        std::memset(results[i], garbage, 4);  // until it is waited for
    }
    auto &products = threads[current].products;
    if (products.empty()) products.emplace_back();
    products.back().push_back(product);
}

void commit_products() {
    auto &products = threads[current].products;
    if (products.empty()) products.emplace_back();
    products.emplace_back();
}

template <Kind kind> void read_tokens(const GroupProduct &product, float (*tokens)[32]) {
    constexpr int per_word = kind == Kind::half ? 2 : 4;
    const uint32_t start = uint32_t(product.descriptor & 0x3fff) << 4;
    if (product.descriptor >> 62 != 1 || (product.descriptor >> 32 & 0x3fff) != 64 ||
        (start & 1023) >= 128)
        fail("wgmma of shared memory that is not in rows of 128 bytes from a multiple of 1024");
    for (int row = 0; row < product.tokens; ++row)
        for (int word = 0; word < 8; ++word) {
            uint32_t address = start + row * 128 + word * 4, value;
            address ^= (address >> 7 & 7) << 4;
            std::memcpy(&value, at(address, 4, "wgmma"), 4);
            note_read(current, address, 4);
            if (!uses[address / 4].fenced)
                fail("wgmma reads shared byte " + std::to_string(address) +
                     ", which no fence.proxy.async lets it see");
            for (int i = 0; i < per_word; ++i)
                tokens[row][word * per_word + i] = element<kind>(value, i, true);
        }
}

template <Kind kind> void finish_group(GroupProduct *const *shares) {
    constexpr int per_word = kind == Kind::half ? 2 : 4, depth = depth_of<kind>;
    static float left[64][32], right[128][32];
    read_tokens<kind>(*shares[0], right);
    for (int thread = 0; thread < 128; ++thread)
        for (int word = 0; word < 4; ++word)
            for (int i = 0; i < per_word; ++i)
                left[thread / 32 * 16 + thread % 32 / 4 + word % 2 * 8]
                    [thread % 4 * per_word + i + word / 2 * depth / 2] =
                        element<kind>(shares[thread]->weights[word], i, false);
    for (int thread = 0; thread < 128; ++thread)
        for (int i = 0; i < shares[0]->tokens / 2; ++i) {
            const float *x = left[thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8];
            const float *y = right[i / 4 * 8 + thread % 4 * 2 + i % 2];
            const uint32_t after = added<kind>(shares[thread]->before[i], x, y);
            std::memcpy(shares[thread]->results[i], &after, 4);
            // Products of one group that add to the same sums follow each other.
            for (auto &group : threads[current / 128 * 128 + thread].products)
                for (GroupProduct &later : group)
                    if (&later != shares[thread] && later.results[i] == shares[thread]->results[i])
                        std::memcpy(&later.before[i], &after, 4);
        }
}

void wait_products(size_t pending) {
    Thread &self = threads[current];
    meet<128>(warpgroups, self, [=](Thread **members) {
        while (members[0]->products.size() > pending + 1) {
            for (size_t i = 0; i < members[0]->products.front().size(); ++i) {
                GroupProduct *shares[128];
                for (int m = 0; m < 128; ++m) shares[m] = &members[m]->products.front()[i];
                if (shares[0]->kind == Kind::half) finish_group<Kind::half>(shares);
                else if (shares[0]->kind == Kind::int8) finish_group<Kind::int8>(shares);
                else finish_group<Kind::e4m3>(shares);
            }
            for (int m = 0; m < 128; ++m)
                members[m]->products.erase(members[m]->products.begin());
        }
    });
}

}  // namespace emulator
