// What bilinear.h and kernels_impl.h use. Those two come after the instructions are enabled: vector
// operations of a function are expanded for the instructions that it was defined with.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"
