"""What runs in C++ on the CPU: `library` compiles it, the others call it. A .cpp belongs to the
Python file of its name; `winograd` has stem.cpp as well,
`matching` has matching_integers.cpp."""
