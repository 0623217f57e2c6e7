#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace mcl {
namespace {

// The first sort key of a row, before its id: -1 for a negative label, else the label, or 0 if labels do not matter.
int64_t group_of(int64_t label, Negatives negatives) {
  if (label < 0) return -1;
  return negatives == Negatives::all ? 0 : label;
}

// Stable sort of `order` by values[order[i]]: a radix sort that passes only over the digits in which values differ.
class RadixSort {
 public:
  explicit RadixSort(int64_t size) : keys_(size), other_keys_(size), other_order_(size) {}

  template <class ValueOf>
  void sort(int64_t* order, ValueOf value_of) {
    const int64_t size = keys_.size();
    if (size == 0) return;
    uint64_t differing = 0;
    bool sorted = true;
    for (int64_t i = 0; i < size; i++) {
      keys_[i] = static_cast<uint64_t>(value_of(order[i])) ^ (uint64_t(1) << 63);
      differing |= keys_[i] ^ keys_[0];
      sorted &= i == 0 || keys_[i - 1] <= keys_[i];
    }
    if (sorted) return;
    for (int shift = 0; shift < 64; shift += DIGIT)
      if (differing >> shift & (BUCKETS - 1)) pass(order, shift);
  }

 private:
  static constexpr int DIGIT = 11;
  static constexpr uint64_t BUCKETS = 1 << DIGIT;
  std::vector<uint64_t> keys_, other_keys_;
  std::vector<int64_t> other_order_;

  void pass(int64_t* order, int shift) {
    const int64_t size = keys_.size();
    int64_t next[BUCKETS] = {};
    for (uint64_t key : keys_) next[key >> shift & (BUCKETS - 1)]++;
    std::exclusive_scan(next, next + BUCKETS, next, int64_t(0));
    for (int64_t i = 0; i < size; i++) {
      const int64_t to = next[keys_[i] >> shift & (BUCKETS - 1)]++;
      other_keys_[to] = keys_[i];
      other_order_[to] = order[i];
    }
    keys_.swap(other_keys_);
    std::copy(other_order_.begin(), other_order_.end(), order);
  }
};

// Numbers the ids of both sides consecutively, in `dropped`. Only "different" needs the codes, and only if some id has
// several labels: else a pair that shares an id shares the label too, and is dropped for it.
void assign_codes(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                Dropped& dropped) {
  const int64_t n = query.size, total = query.size + key.size;
  if (total > INT32_MAX) throw std::length_error("negatives='different' with ids needs fewer than 2^31 rows");
  const auto id_of = [&](int64_t i) { return i < n ? query.ids[i] : key.ids[i - n]; };
  const auto label_of = [&](int64_t i) { return i < n ? query.labels[i] : key.labels[i - n]; };
  std::vector<int64_t> order(total);
  std::iota(order.begin(), order.end(), 0);
  RadixSort(total).sort(order.data(), id_of);

  std::vector<int32_t> code(total);
  bool across_labels = false;
  int32_t next_code = 0;
  for (int64_t i = 0; i < total; i++) {
    if (i > 0) {
      const bool same_id = id_of(order[i]) == id_of(order[i - 1]);
      next_code += !same_id;
      across_labels |= same_id && label_of(order[i]) != label_of(order[i - 1]);
    }
    code[order[i]] = next_code;
  }
  if (!across_labels) return;
  dropped.query_code.resize(n);
  dropped.key_code.resize(key.size);
  for (int64_t i = 0; i < n; i++) dropped.query_code[i] = code[query_order[i]];
  for (int64_t j = 0; j < key.size; j++) dropped.key_code[j] = code[n + key_order[j]];
}

}  // namespace

void sort_rows(const Identity& side, Negatives negatives, int64_t* order) {
  std::iota(order, order + side.size, 0);
  RadixSort sorter(side.size);
  if (side.ids) sorter.sort(order, [&](int64_t i) { return side.ids[i]; });
  if (side.labels) sorter.sort(order, [&](int64_t i) { return group_of(side.labels[i], negatives); });
}

void find_key_ranges(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                     Negatives negatives, int64_t* key_begin, int64_t* key_end) {
  if (!query.labels) {
    std::fill_n(key_begin, query.size, 0);
    std::fill_n(key_end, query.size, key.size);
    return;
  }
  const auto key_group = [&](int64_t j) { return group_of(key.labels[key_order[j]], negatives); };
  int64_t begin = 0, end = 0;
  while (begin < key.size && key_group(begin) < 0) begin++;
  const int64_t valid = begin;
  for (int64_t i = 0; i < query.size; i++) {
    const int64_t group = group_of(query.labels[query_order[i]], negatives);
    if (group < 0) {
      key_begin[i] = key_end[i] = 0;
      continue;
    }
    if (negatives == Negatives::same) {
      // Both sides are sorted by group: the range only moves forward.
      while (begin < key.size && key_group(begin) < group) begin++;
      end = std::max(end, begin);
      while (end < key.size && key_group(end) == group) end++;
    } else {
      begin = valid;
      end = key.size;
    }
    key_begin[i] = begin;
    key_end[i] = end;
  }
}

std::vector<Segment> find_segments(int64_t queries, const int64_t* key_begin, const int64_t* key_end) {
  std::vector<Segment> segments;
  for (int64_t i = 0; i < queries;) {
    const int64_t first = i;
    while (i < queries && key_begin[i] == key_begin[first] && key_end[i] == key_end[first]) i++;
    if (key_begin[first] < key_end[first])
      segments.push_back({first, i - first, key_begin[first], key_end[first] - key_begin[first]});
  }
  return segments;
}

Dropped find_dropped(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
                     Negatives negatives, const std::vector<Segment>& segments) {
  Dropped dropped;
  dropped.begin.assign(query.size, 0);
  dropped.end.assign(query.size, 0);
  const bool by_label = negatives == Negatives::different;
  const int64_t* query_values = by_label ? query.labels : query.ids;
  const int64_t* key_values = by_label ? key.labels : key.ids;
  if (!query_values) return dropped;
  for (const Segment& segment : segments) {
    // Within a segment both sides are sorted by these values.
    const int64_t last = segment.key_begin + segment.keys;
    int64_t begin = segment.key_begin, end = begin;
    for (int64_t i = segment.query_begin; i < segment.query_begin + segment.queries; i++) {
      const int64_t value = query_values[query_order[i]];
      while (begin < last && key_values[key_order[begin]] < value) begin++;
      end = std::max(end, begin);
      while (end < last && key_values[key_order[end]] == value) end++;
      dropped.begin[i] = begin;
      dropped.end[i] = end;
    }
  }
  if (by_label && query.ids) assign_codes(query, query_order, key, key_order, dropped);
  return dropped;
}

}  // namespace mcl
