import { Migration } from '@mikro-orm/migrations'

/**
 * How much of what a limit may be exceeded by has been handed out in a window: `rpc/shared-allowance.ts` says what for.
 *
 * Instances of the version before count what they admit in their own memory only, and never touch the column.
 */
export class RateLimitCredit extends Migration {
  override async up(): Promise<void> {
    this.addSql('alter table rate_limits add column credit integer not null default 0')
  }

  override async down(): Promise<void> {
    this.addSql('alter table rate_limits drop column credit')
  }
}
