// Runs a package written by fxprune.export(format="aoti"), without Python:
//
//   run_package model.pt2 fxprune/_C_cpu.so input.f32 2x16x8x8 [expected.f32]
//
// The operator library is loaded first, since the package calls its operators by name. Files hold
// raw float32. Prints the shape of the output and its time; with an expected output, the largest
// difference, and fails when that is above 1e-4 of the largest value.
#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/torch.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

namespace {

std::vector<int64_t> parse_shape(const std::string& text) {
  std::vector<int64_t> shape;
  std::stringstream stream(text);
  for (std::string part; std::getline(stream, part, 'x');) shape.push_back(std::stoll(part));
  return shape;
}

torch::Tensor read_floats(const std::string& path, const std::vector<int64_t>& shape) {
  torch::Tensor tensor = torch::empty(shape);
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(tensor.data_ptr()), static_cast<std::streamsize>(tensor.nbytes()));
  TORCH_CHECK(file.gcount() == static_cast<std::streamsize>(tensor.nbytes()), path, " holds ",
              file.gcount(), " bytes, expected ", tensor.nbytes());
  return tensor;
}

int run(int argc, char** argv) {
  TORCH_CHECK(argc == 5 || argc == 6, "usage: ", argv[0],
              " model.pt2 _C_cpu.so input.f32 2x16x8x8 [expected.f32]");
  TORCH_CHECK(dlopen(argv[2], RTLD_NOW | RTLD_GLOBAL) != nullptr, "operators: ", dlerror());
  const c10::InferenceMode inference;
  torch::inductor::AOTIModelPackageLoader model(argv[1]);
  const torch::Tensor x = read_floats(argv[3], parse_shape(argv[4]));

  torch::Tensor y = model.run({x})[0];
  constexpr int kCalls = 20;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) y = model.run({x})[0];
  const std::chrono::duration<double, std::milli> spent = std::chrono::steady_clock::now() - start;
  std::cout << "output " << y.sizes() << ", " << spent.count() / kCalls << " ms per call\n";
  if (argc < 6) return 0;

  const torch::Tensor expected = read_floats(argv[5], y.sizes().vec());
  const double error = (y - expected).abs().max().item<double>();
  const double bound = 1e-4 * expected.abs().max().item<double>();
  std::cout << "largest difference " << error << ", at most " << bound << "\n";
  return error <= bound ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
