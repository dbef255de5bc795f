//go:build tools

// Package networkpolicyapi names what the tests build: the module has no code of its own.
package networkpolicyapi

import (
	_ "sigs.k8s.io/network-policy-api/conformance"
)
