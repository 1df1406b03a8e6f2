//go:build tools

// Package tools pins the release of consul that the tests run against; see tests/peers/README.md.
package tools

import _ "github.com/hashicorp/consul"
