// The few parts of onnxruntime's C interface that an operator of one's own needs. Packages of
// onnxruntime for Python have no headers; the layout here is the one that onnxruntime keeps for
// all later versions: functions stand in a table in which a new one only ever comes last.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ddetr_d2::onnxruntime {

// First version of the table with all that is used here: that of onnxruntime 1.17.
constexpr uint32_t kVersion = 17;

// Owned by onnxruntime, known by their addresses alone. A null Status is success.
struct Status;
struct SessionOptions;
struct Domain;
struct Context;
struct Value;
struct TensorInfo;
struct KernelInfo;

enum ErrorCode : int { kInvalidArgument = 2 };
enum ElementType : int { kFloat32 = 1, kInt64 = 7 };
enum Characteristic : int { kRequired = 0 };
enum MemoryType : int { kDefaultMemory = 0 };

// The table, by the places of its functions.
class Api {
 public:
  Status* create_status(ErrorCode code, const char* message) const {
    return call<Status*>(0, code, message);
  }
  Status* create_domain(const char* name, Domain** domain) const {
    return call<Status*>(26, name, domain);
  }
  Status* add_operator(Domain* domain, const struct Operator* op) const {
    return call<Status*>(27, domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return call<Status*>(28, options, domain);
  }
  Status* data(const Value* tensor, void** pointer) const {
    return call<Status*>(51, tensor, pointer);
  }
  Status* axes(const TensorInfo* info, size_t* count) const {
    return call<Status*>(61, info, count);
  }
  Status* shape(const TensorInfo* info, int64_t* lengths, size_t count) const {
    return call<Status*>(62, info, lengths, count);
  }
  Status* create_info(const Value* tensor, TensorInfo** info) const {
    return call<Status*>(65, tensor, info);
  }
  Status* input(const Context* context, size_t index, const Value** tensor) const {
    return call<Status*>(90, context, index, tensor);
  }
  Status* output(Context* context, size_t index, const int64_t* shape, size_t axes,
                 Value** tensor) const {
    return call<Status*>(91, context, index, shape, axes, tensor);
  }
  void release_info(TensorInfo* info) const { call<void>(99, info); }
  // Calls function(data, i) for i from 0 to total - 1, by all threads of the session.
  Status* parallel_for(const Context* context, void (*function)(void*, size_t), size_t total,
                       void* data) const {
    return call<Status*>(274, context, function, total, size_t{0}, data);
  }

 private:
  template <typename Result, typename... Arguments>
  Result call(size_t place, Arguments... arguments) const {
    return reinterpret_cast<Result (*const*)(Arguments...)>(this)[place](arguments...);
  }
};

struct ApiBase {
  const Api* (*get_api)(uint32_t version);
  const char* (*get_version)();
};

// An operator, by the functions that onnxruntime calls; those that are optional may be null.
struct Operator {
  uint32_t version;
  void* (*unused_create_kernel)(const Operator*, const Api*, const KernelInfo*);
  const char* (*name)(const Operator*);
  const char* (*execution_provider)(const Operator*);  // null for the CPU's
  ElementType (*input_type)(const Operator*, size_t index);
  size_t (*inputs)(const Operator*);
  ElementType (*output_type)(const Operator*, size_t index);
  size_t (*outputs)(const Operator*);
  void (*unused_compute)(void* kernel, Context*);
  void (*destroy_kernel)(void* kernel);
  Characteristic (*input_characteristic)(const Operator*, size_t index);
  Characteristic (*output_characteristic)(const Operator*, size_t index);
  MemoryType (*input_memory)(const Operator*, size_t index);
  int (*unused_variadic[4])(const Operator*);
  Status* (*create_kernel)(const Operator*, const Api*, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, Context*);
  Status* (*infer_shapes)(const Operator*, void* context);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

}  // namespace ddetr_d2::onnxruntime
