// An edge daemon in Go: enrolls once, reports how its host is for as long as it runs, and holds one connection until it is
// taken back. See docs/integrate.md.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"

	edgemesh "example.com/edge-daemon/gen/edgemesh/v1"
)

type daemon struct {
	server, folder string
	shown          atomic.Pointer[identity]
	// Closed when the first report is durable: before that every question is denied.
	reported chan struct{}
}

func main() {
	folder := flag.String("state", "./edge-daemon-state", "where its key and certificate are kept")
	id := flag.String("id", "", "the device's name; empty: the server chooses one")
	user := flag.String("user", "demo", "who wants to connect")
	service := flag.String("service", "demo-database", "to what")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *folder, *id, *user, *service); err != nil && ctx.Err() == nil {
		fmt.Fprintf(os.Stderr, "error: %s\n", told(err))
		os.Exit(1)
	}
}

func run(ctx context.Context, folder, id, user, service string) error {
	server := os.Getenv("EDGEMESH_SERVER")
	shown, err := load(folder)
	if err == nil && shown == nil {
		// The token comes from the environment: everyone on the machine can read a command line.
		shown, err = enroll(ctx, server, os.Getenv("EDGEMESH_TOKEN"), folder, id)
	}
	if err != nil {
		return err
	}
	d := &daemon{server: server, folder: folder, reported: make(chan struct{})}
	d.shown.Store(shown)
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	lost := make(chan error, 1)
	go func() { lost <- d.keepReporting(ctx) }()
	over := make(chan error, 1)
	go func() { over <- d.hold(ctx, user, service) }()
	select {
	case err := <-lost:
		return err
	case err := <-over:
		return err
	}
}

// keepReporting opens one heartbeat stream after the other, until the server has ended the identity.
func (d *daemon) keepReporting(ctx context.Context) error {
	for failures := 0; ; failures++ {
		reports, err := d.report(ctx)
		if reports > 1 {
			failures = 0 // a stream that has lived was no accident
		}
		if ctx.Err() != nil || isFinal(err) {
			return err
		}
		if err := pause(ctx, "heartbeat", err, failures, time.Minute); err != nil {
			return err
		}
	}
}

// report reports on one stream. No error: the server wants another one opened.
func (d *daemon) report(ctx context.Context) (reports uint64, err error) {
	conn, err := dial(d.server, d.shown.Load())
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	stream, err := edgemesh.NewHeartbeatServiceClient(conn).Heartbeat(ctx)
	if err != nil {
		return 0, err
	}
	var renewAt time.Time
	for {
		// A stream's first report is whole; later ones may leave out what has not changed.
		report := &edgemesh.HeartbeatRequest{
			Sequence:      reports + 1,
			Posture:       posture(),
			SentAt:        timestamppb.Now(),
			TrustBundleId: d.shown.Load().bundleID(),
		}
		if err := stream.Send(report); err != nil && !errors.Is(err, io.EOF) {
			return reports, err
		}
		answer, err := stream.Recv()
		if err != nil {
			return reports, err
		}
		reports = answer.AcknowledgedSequence
		if reports == 1 {
			fmt.Printf("reported, failing: %s\n", strings.Join(answer.FailingPosture, " "))
			select {
			case <-d.reported:
			default:
				close(d.reported)
			}
		}
		wait := answer.GetNextInterval().AsDuration()
		for _, directive := range answer.Directives {
			if news := directive.GetTrustBundle(); news != nil {
				trusting, err := adopt(d.folder, d.shown.Load(), news.TrustBundle)
				if err != nil {
					fmt.Printf("not trusted: %s\n", told(err)) // who was trusted before is trusted still
					continue
				}
				d.shown.Store(trusting)
				wait = 0 // a change of the authority waits for devices to say that they have it
			}
			if revoked := directive.GetRevoked(); revoked != nil {
				return reports, fmt.Errorf("the device was revoked: %s", revoked.Reason)
			}
			// After a delay, where a whole fleet is asked; the first to ask counts.
			if wanted := directive.GetRenewCertificate(); wanted != nil && renewAt.IsZero() {
				renewAt = time.Now().Add(wanted.GetDelay().AsDuration())
			}
			if wanted := directive.GetReconnect(); wanted != nil {
				return reports, sleep(ctx, wanted.GetDelay().AsDuration())
			}
		}
		if !renewAt.IsZero() && !time.Now().Before(renewAt) {
			fresh, err := renew(ctx, d.server, d.folder, d.shown.Load())
			if err == nil {
				d.shown.Store(fresh)
				fmt.Println("renewed")
				return reports, nil
			}
			// The certificate before is still good.
			fmt.Printf("not renewed yet: %s\n", told(err))
			renewAt = time.Now().Add(time.Minute)
		}
		if err := sleep(ctx, wait); err != nil {
			return reports, err
		}
	}
}

// hold asks for a connection and holds it until it is taken back: on the next stream, where one is lost.
func (d *daemon) hold(ctx context.Context, user, service string) error {
	select {
	case <-d.reported:
	case <-ctx.Done():
		return ctx.Err()
	}
	held := ""
	for failures := 0; ; failures++ {
		ended, err := d.holdOnStream(ctx, user, service, &held)
		if ended || ctx.Err() != nil || isFinal(err) {
			return err
		}
		// What is held is held for half a minute without a stream: pauses are short.
		if err := pause(ctx, "authorize", err, failures, 2*time.Second); err != nil {
			return err
		}
	}
}

func (d *daemon) holdOnStream(ctx context.Context, user, service string, held *string) (ended bool, err error) {
	conn, err := dial(d.server, d.shown.Load())
	if err != nil {
		return false, err
	}
	defer conn.Close()
	stream, err := edgemesh.NewAuthorizeServiceClient(conn).Authorize(ctx)
	if err != nil {
		return false, err
	}
	first := &edgemesh.AuthorizeRequest{Kind: &edgemesh.AuthorizeRequest_Questions{Questions: &edgemesh.Questions{
		Questions: []*edgemesh.Question{{Id: "1", User: user, Service: service}},
	}}}
	if *held != "" {
		first.Kind = &edgemesh.AuthorizeRequest_Resume{
			Resume: &edgemesh.ResumeConnections{ConnectionIds: []string{*held}},
		}
	}
	if err := stream.Send(first); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	for {
		message, err := stream.Recv()
		if err != nil {
			return false, err
		}
		for _, answer := range message.GetAnswers().GetAnswers() {
			switch {
			case answer.Allowed:
				*held = answer.ConnectionId
				fmt.Printf("allowed %s\n", answer.ConnectionId) // connect now
			case answer.RetryAfter != nil: // it could not be decided
				return false, sleep(ctx, answer.RetryAfter.AsDuration())
			default:
				fmt.Printf("denied %s\n", codes(answer.Reasons)) // cut the connection, if it was open
				return true, nil
			}
		}
		if revoked := message.GetRevoked(); revoked != nil {
			fmt.Printf("revoked %s\n", codes(revoked.Reasons)) // cut the connection, and then say so
			acknowledge := &edgemesh.AcknowledgeRevocations{ConnectionIds: []string{revoked.ConnectionId}}
			err := stream.Send(&edgemesh.AuthorizeRequest{
				Kind: &edgemesh.AuthorizeRequest_Acknowledge{Acknowledge: acknowledge},
			})
			if err != nil {
				return true, err
			}
			if err := stream.CloseSend(); err != nil {
				return true, err
			}
			if _, err := stream.Recv(); err != nil && !errors.Is(err, io.EOF) {
				return true, err
			}
			return true, nil
		}
	}
}

// posture measures this host. What is absent was not measured, and the shipped policy takes that for a no.
func posture() *edgemesh.Posture {
	percent, good := 12.0, true
	return &edgemesh.Posture{
		CpuPercent: &percent, MemoryPercent: &percent, DiskPercent: &percent,
		PatchesCurrent: &good, AntivirusEnabled: &good, DiskEncrypted: &good, FirewallEnabled: &good,
		MeasuredAt: timestamppb.Now(),
	}
}

func codes(reasons []*edgemesh.Reason) string {
	var all []string
	for _, reason := range reasons {
		all = append(all, reason.Code)
	}
	return strings.Join(all, " ")
}

// isFinal tells what no repetition helps: the identity was ended.
func isFinal(err error) bool {
	switch reasonOf(err) {
	case "DEVICE_REVOKED", "DEVICE_DELETED", "CERTIFICATE_REVOKED", "CERTIFICATE_RETIRED", "CERTIFICATE_EXPIRED":
		return true
	}
	return false
}

func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return ""
}

func told(err error) string {
	if reason := reasonOf(err); reason != "" {
		return reason + ": " + status.Convert(err).Message()
	}
	return err.Error()
}

// pause waits for as long as the server asks, and on top for any time up to a bound that doubles: a fleet that lost its
// server together does not come back together.
func pause(ctx context.Context, what string, err error, failures int, most time.Duration) error {
	var wait time.Duration
	if err != nil {
		bound := min(most, time.Second<<min(failures, 10))
		wait = time.Duration(rand.Int64N(int64(bound)))
		for _, detail := range status.Convert(err).Details() {
			if retry, ok := detail.(*errdetails.RetryInfo); ok {
				wait += retry.GetRetryDelay().AsDuration()
			}
		}
		fmt.Printf("%s: %s; again in %s\n", what, told(err), wait.Round(time.Millisecond))
	}
	return sleep(ctx, wait)
}

func sleep(ctx context.Context, wait time.Duration) error {
	select {
	case <-time.After(wait):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
