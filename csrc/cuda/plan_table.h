// The plans of this process, by everything that a plan depends on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "plan.h"

namespace cjepa {

// An operator and all properties of its arguments on which its launches depend.
using PlanKey = std::vector<int64_t>;

struct PlanKeyHash {
  size_t operator()(const PlanKey& key) const;
};

// Keeps the plans that were used last, up to a number of them. All functions may be called from any
// thread.
class PlanTable {
 public:
  explicit PlanTable(size_t capacity);

  // The plan of a key, or null. The caller shares it, so it lives until the call that runs it ends.
  std::shared_ptr<const Plan> find(const PlanKey& key);

  // Whether a call that found no plan shall record one: from the second call of a key on, so that
  // calls that never repeat cost nothing more, until a few recordings were refused.
  bool shall_record(const PlanKey& key);

  // Notes that a recording of a call gave no plan.
  void refuse(const PlanKey& key);

  void add(PlanKey key, Plan plan);
  void clear();
  size_t size();

 private:
  struct Entry {
    PlanKey key;
    std::shared_ptr<const Plan> plan;  // null while the key was only met
    int refused = 0;                   // recordings that gave no plan
  };
  using Entries = std::list<Entry>;  // the entry used last comes first

  void insert(PlanKey key, std::shared_ptr<const Plan> plan);

  const size_t capacity_;
  std::mutex mutex_;
  Entries entries_;
  std::unordered_map<PlanKey, Entries::iterator, PlanKeyHash> by_key_;
};

}  // namespace cjepa
