package agent

import "context"

// LoadImages puts f round the import of each archive.
func (c *Config) LoadImages(f func(load func(context.Context, string) ([]string, error)) func(context.Context, string) ([]string, error)) {
	c.loadImages = f
}
