// Stand-in for the test objects of tvm-ffi, which no model needs.
