// The products of the kernels' wgmma.cuh are in hopper.cuh here.
#pragma once
#include "hopper.cuh"
