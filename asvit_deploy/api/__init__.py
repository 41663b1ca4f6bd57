"""What the commands do, a function each in a module of its name; `asvit_deploy` offers them."""
