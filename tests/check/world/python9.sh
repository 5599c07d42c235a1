#!/usr/bin/env python9
print(1)
