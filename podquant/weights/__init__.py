"""From bytes to device arrays: sources of weights, the windows that are read, their placement on a mesh.

May import `model` for the layout of its arrays. Runs no step and converts nothing: never imports `engine` or `convert`.
"""
