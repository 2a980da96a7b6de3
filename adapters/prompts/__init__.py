"""Named prompt templates: variables in, a chat out.

variables   what a template takes: types, defaults, bounds
template    a definition: its parts, its content's hash, what is wrong with it
filling     the parts rendered, and the chat that they make
worker      the same in a process that can be killed
shelf       names, versions and aliases in the catalog
"""
