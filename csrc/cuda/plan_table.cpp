#include "plan_table.h"

#include <algorithm>

namespace cjepa {

// FNV-1a over words. Its last step mixes the high bits, which differ most, into the low ones.
size_t PlanKeyHash::operator()(const PlanKey& key) const {
  uint64_t hash = 14695981039346656037ull;
  for (int64_t word : key) hash = (hash ^ static_cast<uint64_t>(word)) * 1099511628211ull;
  return static_cast<size_t>(hash ^ (hash >> 32));
}

PlanTable::PlanTable(size_t capacity) : capacity_(std::max<size_t>(capacity, 1)) {}

std::shared_ptr<const Plan> PlanTable::find(const PlanKey& key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_key_.find(key);
  if (found == by_key_.end()) return nullptr;
  entries_.splice(entries_.begin(), entries_, found->second);
  return found->second->plan;
}

bool PlanTable::shall_record(const PlanKey& key) {
  constexpr int kMostRefusals = 3;
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_key_.find(key);
  if (found != by_key_.end()) {
    const Entry& entry = *found->second;
    return entry.plan == nullptr && entry.refused < kMostRefusals;
  }
  insert(key, nullptr);
  return false;
}

void PlanTable::refuse(const PlanKey& key) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_key_.find(key);
  if (found != by_key_.end()) ++found->second->refused;
}

void PlanTable::add(PlanKey key, Plan plan) {
  auto shared = std::make_shared<const Plan>(std::move(plan));
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto found = by_key_.find(key);
  if (found != by_key_.end()) {
    entries_.splice(entries_.begin(), entries_, found->second);
    found->second->plan = std::move(shared);
  } else {
    insert(std::move(key), std::move(shared));
  }
}

void PlanTable::clear() {
  const std::lock_guard<std::mutex> lock(mutex_);
  by_key_.clear();
  entries_.clear();
}

size_t PlanTable::size() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return static_cast<size_t>(std::count_if(entries_.begin(), entries_.end(),
                                           [](const Entry& e) { return e.plan != nullptr; }));
}

void PlanTable::insert(PlanKey key, std::shared_ptr<const Plan> plan) {
  if (entries_.size() == capacity_) {
    by_key_.erase(entries_.back().key);
    entries_.pop_back();
  }
  entries_.push_front({.key = key, .plan = std::move(plan)});
  by_key_.emplace(std::move(key), entries_.begin());
}

}  // namespace cjepa
