"""The quickstart: two small sets of made-up reviews and a small BERT, all written by `make`."""
