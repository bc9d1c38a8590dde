"""The bundled tiny Llama."""
