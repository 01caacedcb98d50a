"""The doors' operations in C++, file by file as in ops/ and ref/: tensors in, one native call, tensors out."""
