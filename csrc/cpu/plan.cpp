#include "plan.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace mcl {
namespace {

// What the rows are sorted by before their id: -1 where nothing matches, then the label where it matters.
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

// Ranks of the ids of both sides in one order, where "different" needs them: empty if rows that share an id always
// share the label too, since such a pair is dropped for its label.
void find_codes(const Identity& query, const int64_t* query_order, const Identity& key, const int64_t* key_order,
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
  int32_t rank = 0;
  for (int64_t i = 0; i < total; i++) {
    if (i > 0) {
      const bool same_id = id_of(order[i]) == id_of(order[i - 1]);
      rank += !same_id;
      across_labels |= same_id && label_of(order[i]) != label_of(order[i - 1]);
    }
    code[order[i]] = rank;
  }
  if (!across_labels) return;
  dropped.query_code.resize(n);
  dropped.key_code.resize(key.size);
  for (int64_t i = 0; i < n; i++) dropped.query_code[i] = code[query_order[i]];
  for (int64_t j = 0; j < key.size; j++) dropped.key_code[j] = code[n + key_order[j]];
}

// Nearly equal parts of `size`, of about `most` at most, in whole grains but for the last.
struct Blocks {
  static constexpr int64_t GRAIN = 48;  // whole groups of 6 rows, and whole vectors of 16 columns
  int64_t begin, size, count;
  Blocks(int64_t begin, int64_t size, int64_t most) : begin(begin), size(size), count((size + most - 1) / most) {}
  int64_t start(int64_t block) const {
    const int64_t grains = (size + GRAIN - 1) / GRAIN;
    return begin + std::min(size, grains * block / count * GRAIN);
  }
  int64_t length(int64_t block) const { return start(block + 1) - start(block); }
};

// The tasks of each segment fall into rounds in which no two share a block. Rounds of different segments run side by
// side, those that end a segment last: so a long chain of rounds begins first, and a task seldom has to wait.
class Rounds {
 public:
  // The upper triangle of `blocks` against themselves, as a round robin: each block meets every other once, and
  // itself in the round in which it would sit out (with an even number of blocks: in a round of its own).
  void add_triangle(const Blocks& blocks) {
    const int64_t players = blocks.count % 2 ? blocks.count : blocks.count - 1;  // that move in the circle
    const int64_t rounds = blocks.count;
    for (int64_t round = 0; round < players; round++) {
      const int64_t left = rounds - round;
      add_pair(left, blocks, round, players < blocks.count ? players : round);
      for (int64_t k = 1; k <= players / 2; k++)
        add_pair(left, blocks, (round + k) % players, (round - k + players) % players);
    }
    if (players < blocks.count)
      for (int64_t block = 0; block < blocks.count; block++) add_pair(1, blocks, block, block);
  }

  // All pairs of row and column blocks, as a Latin square.
  void add_rectangle(const Blocks& rows, const Blocks& columns) {
    const int64_t size = std::max(rows.count, columns.count);
    for (int64_t round = 0; round < size; round++)
      for (int64_t row = 0; row < rows.count; row++) {
        const int64_t column = (row + round) % size;
        if (column < columns.count) add(size - round, rows, row, columns, column, false);
      }
  }

  Schedule schedule(int64_t queries, int64_t keys, bool self) {
    // The smallest tasks at the very end, so that all threads finish together.
    const auto cost = [](const Task& task) { return task.rows * task.columns / (task.diagonal ? 2 : 1); };
    if (!rounds_.empty())
      std::stable_sort(rounds_[0].begin(), rounds_[0].end(),
                       [&](const Task& a, const Task& b) { return cost(a) > cost(b); });

    Schedule result;
    result.met_queries.resize(queries);
    result.met_keys.resize(self ? 0 : keys);
    std::vector<int64_t> last_of_query(queries, NO_TASK), last_of_key(self ? 0 : keys, NO_TASK);  // where blocks begin
    std::vector<int64_t>& last_of_column_block = self ? last_of_query : last_of_key;
    std::vector<bool>& met_columns = self ? result.met_queries : result.met_keys;
    for (auto round = rounds_.rbegin(); round != rounds_.rend(); ++round) {
      for (Task& task : *round) {
        int64_t& last_of_rows = last_of_query[task.row_begin];
        int64_t& last_of_columns = last_of_column_block[task.column_begin];
        task.before_of_rows = last_of_rows;
        task.before_of_columns = last_of_columns;
        last_of_rows = last_of_columns = result.tasks.size();
        result.tasks.push_back(task);
        result.most_rows = std::max(result.most_rows, task.rows);
        result.most_columns = std::max(result.most_columns, task.columns);
        // Blocks are met whole, so once.
        if (task.before_of_rows == NO_TASK)
          std::fill_n(result.met_queries.begin() + task.row_begin, task.rows, true);
        if (task.before_of_columns == NO_TASK)
          std::fill_n(met_columns.begin() + task.column_begin, task.columns, true);
      }
      result.most_tasks = std::max<int64_t>(result.most_tasks, round->size());
      std::vector<Task>().swap(*round);
    }
    return result;
  }

 private:
  std::vector<std::vector<Task>> rounds_;  // by how many rounds of its segment are left after it

  // `left` counts the round itself.
  void add(int64_t left, const Blocks& rows, int64_t row, const Blocks& columns, int64_t column, bool diagonal) {
    if (left > int64_t(rounds_.size())) rounds_.resize(left);
    rounds_[left - 1].push_back({rows.start(row), rows.length(row), columns.start(column), columns.length(column),
                                 diagonal, NO_TASK, NO_TASK});
  }

  void add_pair(int64_t left, const Blocks& blocks, int64_t a, int64_t b) {
    add(left, blocks, std::min(a, b), blocks, std::max(a, b), a == b);
  }
};

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
      // Both sides are sorted by group: the range only moves on.
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
  if (by_label && query.ids) find_codes(query, query_order, key, key_order, dropped);
  return dropped;
}

// The largest blocks that leave enough tasks side by side, wherever most of the work lies.
int64_t block_size(const std::vector<Segment>& segments, bool self, int64_t enough_tasks) {
  constexpr int64_t FEWEST_ROWS = 96, MOST_ROWS = 1024;
  for (int64_t size = MOST_ROWS;; size = size * 3 / 4) {
    // In pairs of rows: all there is to do, and what the longest chain of rounds of one segment has.
    double work = 0, chain = 0;
    for (const Segment& segment : segments) {
      const double queries = segment.queries, keys = segment.keys;
      const double rows = std::min<double>(queries, size), columns = std::min<double>(keys, size);
      work += self ? queries * queries / 2 : queries * keys;
      if (self)
        chain = std::max(chain, queries <= size ? queries * queries / 2 : queries * rows);
      else
        chain = std::max(chain, std::max(queries / rows, keys / columns) * rows * columns);
    }
    if (chain * enough_tasks <= work || size <= FEWEST_ROWS) return std::max(size, FEWEST_ROWS);
  }
}

Schedule make_schedule(const std::vector<Segment>& segments, int64_t queries, int64_t keys, bool self,
                       int64_t enough_tasks) {
  Rounds rounds;
  const int64_t size = block_size(segments, self, enough_tasks);
  for (const Segment& segment : segments) {
    const Blocks rows(segment.query_begin, segment.queries, size), columns(segment.key_begin, segment.keys, size);
    if (!self)
      rounds.add_rectangle(rows, columns);
    else if (segment.queries > 1)
      rounds.add_triangle(rows);
  }
  return rounds.schedule(queries, keys, self);
}

}  // namespace mcl
