// Package storytest tells what reconcilers do as stories: files of commands that
// put objects into a [World], let reconcilers work one key at a time in an order
// that is always the same, and show each request they make. See [Stories], and
// the comment of Story.command for the commands.
//
// Tests of a room that use it are in its external test package.
package storytest
