// Stand-in for sorting on the CPU, which no model for a GPU asks for: 0.2 MB.
